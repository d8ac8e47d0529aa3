"""Explicit Runge–Kutta solves: the state, one step of a tableau, a whole solve on a fixed grid.

A method with coefficients (a, b, c) makes the step from t to t + Δ by

    k_i = f(t + c_i Δ, h + Δ Σ_{j<i} a_ij k_j),    h(t + Δ) = h + Δ Σ_i b_i k_i

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, eq. II.1.8). A grid is given by its N + 1 points,
never by a float step size, so that it has exactly N steps.

A state is a tuple of tensors, of which the first is h; what follows is integrated along with it (the integrals of a
penalty; in an adjoint solve the adjoint).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from resode.blocks.tableaux import Tableau
from resode.errors import InvalidInput
from resode.layers.context import Field, SolveContext

State = tuple[Tensor, ...]


@dataclass
class SolveStats:
    """What the last solve cost: evaluations of f forward and backward, steps accepted and rejected."""

    nfe_forward: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0


class RightHandSide(Protocol):
    """What a scheme integrates: the slopes of a state, told of the steps that are tried."""

    coupled: int
    """How many parts of the state, the first ones, the slopes depend on: the others are integrals of them."""
    measured: int
    """How many parts of the state, the first ones, an error control looks at."""

    def __call__(self, t: float | Tensor, state: State) -> State: ...
    def begin_step(self, start: float, end: float) -> None: ...
    def keep(self) -> None: ...
    def accept_step(self) -> None: ...
    def reject_step(self) -> None: ...


Integrands = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, State]]
"""From x ↦ f(t, x) and the state h: f(t, h), and the integrands of what is integrated along with h."""


class Solve:
    """One solve in progress: the branch in its context, with the evaluations counted.

    Args:
        branch: f, as ``branch(t, h)``.
        context: what this solve holds fixed.
        dtype: the type in which the branch is given its state, if not the state's own.
        integrands: what is integrated along with h.
    """

    coupled = measured = 1

    def __init__(
        self,
        branch: Field,
        context: SolveContext,
        dtype: torch.dtype | None = None,
        integrands: Integrands | None = None,
    ) -> None:
        self.branch, self.context, self.dtype, self.integrands = branch, context, dtype, integrands
        self.stats = SolveStats()
        self.backward = False
        """Whether evaluations are those of a backward pass."""
        self.compiler: Any = None
        """Makes compiled steps (``blocks.compiled.Compiler``), if there is one."""
        self.described: object = None
        """The compiler's note of the settings of the branch's modules."""

    def __call__(self, t: float | Tensor, state: State) -> State:
        """The slopes of ``state``, counted as one evaluation of f.

        Raises:
            InvalidInput: when the branch changes the shape of h.
        """
        self.count(1)
        h = state[0]
        x = h if self.dtype is None else h.to(self.dtype)
        if self.integrands is None:
            return (self.evaluate(t, x).to(h.dtype),)
        out, integrands = self.integrands(lambda x: self.evaluate(t, x), x)
        return (out.to(h.dtype), *integrands)

    def evaluate(self, t: float | Tensor, x: Tensor) -> Tensor:
        """f(t, x), in the solve's context."""
        out = self.context.evaluate(self.branch, t, x)
        if out.shape != x.shape:
            raise InvalidInput(
                f"the branch turns a state of shape {tuple(x.shape)} into {tuple(out.shape)}: the vector field of an "
                "ODE must keep the shape; change the shape in a transition before or after the block"
            )
        return out

    def count(self, evaluations: int) -> None:
        """Count ``evaluations`` of f."""
        if self.backward:
            self.stats.nfe_backward += evaluations
        else:
            self.stats.nfe_forward += evaluations

    def begin_step(self, start: float | Tensor, end: float | Tensor) -> None:
        """Say that the evaluations to come are stages of the step from ``start`` to ``end``."""
        self.context.begin_step(start, end)

    def keep(self) -> None:
        """What was met since the step began will count, whatever becomes of the step."""
        self.context.accept_step()

    def accept_step(self) -> None:
        """The step was accepted: what its stages met will count."""
        self.context.accept_step()
        if not self.backward:
            self.stats.accepted += 1

    def reject_step(self) -> None:
        """The step was rejected."""
        if not self.backward:
            self.stats.rejected += 1


def combine(state: State, step: float | Tensor, weights: Sequence[float], slopes: Sequence[State]) -> State:
    """state + step·Σ weights·slopes, part by part, by plain additions (nothing is stacked)."""
    return tuple(
        _axpys(h, [(step * w, slope[part]) for w, slope in zip(weights, slopes, strict=True) if w != 0.0])
        for part, h in enumerate(state)
    )


def _axpys(h: Tensor, terms: Sequence[tuple[float | Tensor, Tensor]]) -> Tensor:
    # The first sum is a new tensor, and the others are added in its place: no memory is asked for. (Under a transform
    # of torch.func a batched slope may not fit into it.)
    fresh = torch._C._are_functorch_transforms_active()
    own = False
    for factor, slope in terms:
        if isinstance(factor, Tensor):
            h = torch.addcmul(h, slope, factor.to(h.dtype))
        elif own and not fresh:
            h.add_(slope, alpha=factor)
        else:
            h, own = torch.add(h, slope, alpha=factor), True
    return h


def stage_time(t: float | Tensor, end: float | Tensor, c: float) -> float | Tensor:
    """t + c·(end − t), which is ``end`` itself for c = 1, whatever the rounding."""
    return end if c == 1.0 else t + c * (end - t)


@dataclass(frozen=True)
class Trial:
    """A step that was tried: its end, and for an embedded pair the estimate of its error and f at its end."""

    state: State
    error: State | None = None
    last: State | None = None


def rk_step(
    f: RightHandSide,
    tableau: Tableau,
    t: float | Tensor,
    end: float | Tensor,
    state: State,
    *,
    first: State | None = None,
    base: State | None = None,
    sign: float = 1.0,
    control: bool = False,
    reused: bool = False,
) -> Trial:
    """One step from ``t`` to ``end``.

    Args:
        state: the state at ``t``.
        first: f at the start, where it is known.
        base: what the increment is added to, if not to ``state``.
        sign: −1 to subtract the increment.
        control: estimate the error, too.
        reused: f at the end will be the first stage of the next step, and so part of the result.

    Stages that serve the estimate alone, and the estimate itself, are no part of the graph.
    """
    step, inner = end - t, state[: f.coupled]
    slopes = [f(t, inner) if first is None else first]
    for row, c in zip(tableau.a[1 : tableau.solution_stages], tableau.c[1 : tableau.solution_stages], strict=True):
        slopes.append(f(stage_time(t, end, c), combine(inner, step, row, slopes)))
    weights = tableau.b[: tableau.solution_stages]
    result = combine(state if base is None else base, sign * step, weights, slopes)
    if not control:
        return Trial(result)
    known = len(slopes)
    with torch.set_grad_enabled(torch.is_grad_enabled() and reused):
        # Of a first-same-as-last pair the only stage to come starts from the result.
        for row, c in zip(tableau.a[known:], tableau.c[known:], strict=True):
            at = result[: f.coupled] if tableau.fsal else combine(inner, step, row, slopes)
            slopes.append(f(stage_time(t, end, c), at))
    with torch.no_grad():
        measured = [tuple(part.detach() for part in slope[: f.measured]) for slope in slopes]
        zero = tuple(torch.zeros_like(part) for part in measured[0])
        error = combine(zero, step, tableau.error, measured)
    return Trial(result, error, slopes[-1] if tableau.fsal else None)


def make_step(f: RightHandSide) -> Callable[..., Trial]:
    """:func:`rk_step`, or its compiled form where ``f`` has a compiler."""
    compiler = getattr(f, "compiler", None)
    return rk_step if compiler is None else compiler.step


class StepMap(Protocol):
    """A way to make one step; a scheme decides from where to where."""

    error_order: int
    """Order of the error estimate."""

    def core(self, state: State) -> State:
        """The part of ``state`` from which a step's first stage starts."""
        ...

    def __call__(
        self,
        f: RightHandSide,
        t: float,
        end: float,
        state: State,
        first: State | None = None,
        control: bool = False,
        reused: bool = False,
    ) -> Trial: ...


@dataclass(frozen=True)
class RungeKutta:
    """The steps of a tableau."""

    tableau: Tableau

    @property
    def error_order(self) -> int:
        return self.tableau.embedded_order or 0

    def core(self, state: State) -> State:
        return state

    def __call__(
        self,
        f: RightHandSide,
        t: float,
        end: float,
        state: State,
        first: State | None = None,
        control: bool = False,
        reused: bool = False,
    ) -> Trial:
        return make_step(f)(f, self.tableau, t, end, state, first=first, control=control, reused=reused)


Watch = Callable[[float, float, State], None]
"""Told of each step accepted: from where, to where, and the state at its start."""


class Scheme(Protocol):
    """A way from one end of an interval to the other, by steps of some map."""

    tableau: Tableau

    def integrate(self, f: RightHandSide, state: State, step: StepMap, watch: Watch | None = None) -> State:
        """The state at the end of the interval, from ``state`` at its start."""
        ...

    def reversed(self) -> "Scheme":
        """The same way, from its end to its start."""
        ...


def uniform_grid(t0: float, t1: float, steps: int) -> tuple[float, ...]:
    """The ``steps`` + 1 points of a uniform grid from ``t0`` to ``t1``."""
    return (*tuple(t0 + (t1 - t0) * (i / steps) for i in range(steps)), t1)


def check_breakpoints(grid: Sequence[float], breakpoints: Sequence[float]) -> None:
    """Check that every breakpoint inside the grid's interval is one of its points.

    Raises:
        InvalidInput: with the first breakpoint that is not.
    """
    width = abs(grid[-1] - grid[0])
    for point in breakpoints:
        inside = min(grid[0], grid[-1]) < point < max(grid[0], grid[-1])
        if inside and min(abs(point - t) for t in grid) > 1e-9 * width:
            raise InvalidInput(
                f"a grid of {len(grid) - 1} steps from {grid[0]:g} to {grid[-1]:g} steps over the breakpoint t = "
                f"{point:g}, where the branch (or its mask) changes: use a number of steps whose grid has that point"
            )


@dataclass(frozen=True)
class FixedGrid:
    """Steps of one tableau from point to point of a grid."""

    tableau: Tableau
    grid: tuple[float, ...]

    def integrate(self, f: RightHandSide, state: State, step: StepMap, watch: Watch | None = None) -> State:
        for start, end in pairwise(self.grid):
            f.begin_step(start, end)
            after = step(f, start, end, state).state
            f.accept_step()
            if watch is not None:
                watch(start, end, state)
            state = after
        return state

    def reversed(self) -> "FixedGrid":
        return FixedGrid(self.tableau, self.grid[::-1])
