"""One step in depth, applied to polynomials: the coefficient of z^k belongs to the paths of length k.

A step h ↦ P(S(h) + f(h)) with the Jacobians P, S and J of what follows the addition, of the shortcut and of the branch
pulls the cotangent Σ_k v_k z^k back to

    Σ_k (SᵀPᵀ v_k + JᵀPᵀ v_{k−1}) z^k

and pushes the tangent Σ_k u_k z^k forward to Σ_k P (S u_k + J u_{k−1}) z^k: a path that goes through the branch is one
longer. A plain layer has no shortcut; a transition, no branch.

Within a step of a Runge–Kutta method the evaluations of f can be told apart in the same way. Its map is
h + Δ Σ_i b_i f(y_i) with y_i = h + Δ Σ_{j<i} a_ij f(y_j), and with J_i the Jacobian of f at y_i, v is pulled back to

    v + Σ_i y̅_i,    y̅_i = z Δ J_iᵀ (b_i v + Σ_{j>i} a_ji y̅_j)

while a tangent goes the same way with a and b in each other's place. Here, too, the grade rises with each J, and so a
step of s stages adds up to s to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from resode.blocks.residual import add_branch
from resode.blocks.solvers import Solve, combine, stage_time
from resode.dynamics import Increment, Step
from resode.dynamics.step import identity
from resode.errors import InvalidInput
from resode.layers.context import evaluate
from resode.paths.linear import Identity, Linear, Vectors, Zero, linearize

Grade = Literal["step", "evaluation"]
GRADES: tuple[Grade, ...] = ("step", "evaluation")

Product = Callable[[Vectors], Vectors]
"""A linear map, applied to each of some vectors."""


class GradedStep:
    """``step`` at the state ``h``, as a linear map on polynomials.

    Args:
        grade: of a solver's step, what a path's length counts: the steps it does not go round, or the evaluations of f
            that it goes through.

    ``value`` is the state after the step.

    Raises:
        InvalidInput: for a branch of another shape than the shortcut's; a solver's step whose branch was replaced, so
            that its evaluations of f are not known.
    """

    def __init__(self, step: Step, h: Tensor, grade: Grade) -> None:
        self.has_choice, self.is_counted = step.has_choice, step.is_counted
        self.scale: float | Tensor = 1.0
        self.branch: Stages | None = None
        if self.has_choice:
            self.scale = step.scale.detach() if isinstance(step.scale, Tensor) else step.scale
            self.shortcut = linearize(step.shortcut, h)
            self.branch = branch_stages(step, h, grade)
            self.post = linearize(step.post, add_branch(self.shortcut.value, self.branch.value, self.scale))
        elif self.is_counted:
            self.shortcut = Zero()
            self.branch = branch_stages(step, h, grade)
            self.post = Identity(self.branch.value)
        else:
            # Every path goes this way, and none is longer for it.
            self.shortcut = Identity(h)
            self.post = linearize(identity if _is_identity(step) else step, h)

    @property
    def value(self) -> Tensor:
        return self.post.value

    def pull(self, v: Vectors, most: int | None = None, together: int = 1) -> Vectors:
        """The cotangent Σ_k v_k z^k of the state after the step, pulled back to the state before it.

        Args:
            v: its coefficients. They are taken out of the list as they are used up, so that no more than one
                polynomial is held.
            most: the last coefficient, of z^most, collects those of all higher powers, too.
            together: how many coefficients share a backward pass.
        """
        branch = None if self.branch is None else self.branch.pulling(most)

        def apply(some: Vectors) -> Vectors:
            g = self.post.pull(some)
            return self._sum(self.shortcut.pull(g), g, branch)

        return self._map(v, apply, most, together)

    def push(self, u: Vectors, most: int | None = None, together: int = 1) -> Vectors:
        """The tangent Σ_k u_k z^k of the state before the step, pushed to the state after it; as :meth:`pull`."""
        branch = None if self.branch is None else self.branch.pushing(most)

        def apply(some: Vectors) -> Vectors:
            return self.post.push(self._sum(self.shortcut.push(some), some, branch))

        return self._map(u, apply, most, together)

    def route(self, v: Tensor, through: bool) -> Tensor | None:
        """The cotangent ``v`` pulled back through the branch, or round it by the shortcut; None is zero."""
        (g,) = self.post.pull([v])
        if g is None:
            return None
        if not through:
            return self.shortcut.pull([g])[0]
        (pulled,) = self.branch.linears[0].pull([g])
        return plus(None, pulled, self.scale)

    def _map(self, vectors: Vectors, apply: Product, most: int | None, together: int) -> Vectors:
        count = len(vectors) + (0 if self.branch is None else len(self.branch.linears))
        if most is not None:
            count = min(count, most + 1)
        found: Vectors = []
        for start in range(0, count, together):
            some = [vectors[k] if k < len(vectors) else None for k in range(start, min(start + together, count))]
            vectors[start : start + together] = [None] * len(vectors[start : start + together])
            found += apply(some)
        while found and found[-1] is None:
            found.pop()
        return found

    def _sum(self, around: Vectors, some: Vectors, branch: "Recursion | None") -> Vectors:
        """What went round the branch, and what goes through it."""
        if branch is None:
            return around
        return [plus(a, b, self.scale) for a, b in zip(around, branch(some), strict=True)]


def branch_stages(step: Step, h: Tensor, grade: Grade) -> "Stages":
    """The branch of ``step`` at ``h``: its one evaluation, or those of the solver's step that it is."""
    increment = step.branch
    if grade == "step" or step.end is None:
        call = partial(evaluate, increment, step.t) if step.kind == "residual" else partial(increment, step.t)
        return Stages.one(Linear(call, h))
    if not isinstance(increment, Increment):
        raise InvalidInput(
            f"step {step.label!r} is a solver's step whose branch was replaced, and its evaluations of f are not "
            "known: use grade='step'"
        )
    return Stages.of(increment, h)


@dataclass(frozen=True)
class Stages:
    """The evaluations that make a branch: Σ_i b_i f(y_i) with y_i = h + Σ_{j<i} a_ij f(y_j), f including Δ.

    Args:
        linears: the derivatives of f at the y_i.
        step: Δ.
        a, b: of the tableau.
        value: the branch at h.
    """

    linears: Sequence[Linear]
    step: float
    a: Sequence[Sequence[float]]
    b: Sequence[float]
    value: Tensor

    @classmethod
    def one(cls, linear: Linear) -> "Stages":
        """A branch that is one evaluation."""
        return cls([linear], 1.0, ((),), (1.0,), linear.value)

    @classmethod
    def of(cls, increment: Increment, h: Tensor) -> "Stages":
        """The evaluations of a solver's step from ``h``."""
        solve, tableau, t, end = increment.solve(), increment.tableau, increment.t, increment.end
        count, step = tableau.solution_stages, end - t
        linears: list[Linear] = []
        for row, c in zip(tableau.a[:count], tableau.c[:count], strict=True):
            (y,) = combine((h,), step, row, [(linear.value,) for linear in linears])
            linears.append(Linear(partial(_slope, solve, stage_time(t, end, c)), y))
        weights = tableau.b[:count]
        (value,) = combine((torch.zeros_like(h),), step, weights, [(linear.value,) for linear in linears])
        return cls(linears, step, tableau.a[:count], weights, value)

    def pulling(self, most: int | None) -> "Recursion":
        """The recursion for cotangents: from the last stage to the first."""
        order = range(len(self.linears))[::-1]
        into = {i: {j: self.a[j][i] for j in order if j > i and self.a[j][i] != 0.0} for i in order}
        maps = {i: self.linears[i].pull for i in order}
        return Recursion(maps, self.step, dict(enumerate(self.b)), into, dict.fromkeys(order, 1.0), most)

    def pushing(self, most: int | None) -> "Recursion":
        """The recursion for tangents: from the first stage to the last."""
        order = range(len(self.linears))
        into = {i: {j: self.a[i][j] for j in range(i) if self.a[i][j] != 0.0} for i in order}
        maps = {i: self.linears[i].push for i in order}
        return Recursion(maps, self.step, dict.fromkeys(order, 1.0), into, dict(enumerate(self.b)), most)


class Recursion:
    """Σ_i q_i y_i with y_i = z Δ M_i (p_i x + Σ_j c_ij y_j), for a polynomial x whose coefficients come in order.

    Args:
        maps: the M_i, in an order in which each needs only those before it.
        step: Δ.
        p, into, q: the numbers p_i, c_ij (those that are not 0) and q_i.
        most: the coefficient of z^most collects those of all higher powers.

    Each call takes some coefficients more of x, and gives as many of the sum. Between the calls one tensor a stage is
    held: the last coefficient of p_i x + Σ_j c_ij y_j, which the factor z hands to the next.
    """

    def __init__(
        self,
        maps: dict[int, Product],
        step: float,
        p: dict[int, float],
        into: dict[int, dict[int, float]],
        q: dict[int, float],
        most: int | None,
    ) -> None:
        self.maps, self.step, self.p, self.into, self.q, self.most = maps, step, p, into, q, most
        self.held: dict[int, Tensor | None] = dict.fromkeys(maps)
        self.done = 0

    def __call__(self, x: Vectors) -> Vectors:
        self.done += len(x)
        y: dict[int, Vectors] = {}
        for i, apply in self.maps.items():
            given = [plus(None, coefficient, self.p[i]) for coefficient in x]
            for j, weight in self.into[i].items():
                given = [plus(a, b, weight) for a, b in zip(given, y[j], strict=True)]
            raised, self.held[i] = [self.held[i], *given[:-1]], given[-1]
            if self.most is not None and self.done == self.most + 1:
                raised[-1] = plus(raised[-1], given[-1])
            y[i] = [plus(None, product, self.step) for product in apply(raised)]
        found: Vectors = [None] * len(x)
        for i, weight in self.q.items():
            found = [plus(a, b, weight) for a, b in zip(found, y[i], strict=True)]
        return found


def plus(a: Tensor | None, b: Tensor | None, factor: float | Tensor = 1.0) -> Tensor | None:
    """a + factor·b, where None is zero."""
    if b is None or (not isinstance(factor, Tensor) and factor == 0.0):
        return a
    if isinstance(factor, Tensor):
        return factor * b if a is None else a + factor * b
    if a is None:
        return b if factor == 1.0 else factor * b
    return torch.add(a, b, alpha=factor)


def _slope(solve: Solve, t: float, y: Tensor) -> Tensor:
    return solve(t, (y,))[0]


def _is_identity(step: Step) -> bool:
    """Whether a step has lost its branch, and does nothing without it."""
    maps = (step.shortcut, step.post) if step.kind == "residual" else ()
    return step.is_deleted and all(map is identity or type(map) is torch.nn.Identity for map in maps)
