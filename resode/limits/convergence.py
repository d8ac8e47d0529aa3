"""Convergence in the number of steps: is a trained ODE net the flow it claims to be?

A net whose blocks are near an ODE gives the same answers with any solver that is accurate enough, and its error
against the exact flow falls at the solver's order. One that has fitted its own coarse grid does not
(Ott et al. 2021, arXiv 2007.15386; Queiruga et al. 2020, arXiv 2008.02389).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from resode.blocks.ode import ODEBlock, ode_blocks, solver_settings
from resode.blocks.projected import ProjectedODE
from resode.blocks.settings import check_solver
from resode.blocks.solvers import check_breakpoints, uniform_grid
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput, choose
from resode.limits.comparison import ratio, right
from resode.nets.net import evaluating

MOST_STEPS = 64
FINER = {"rk4": 2, "euler": 8}
"""How many times the largest number of steps the reference makes: evaluations of f as many with one as with the other.
With twice the steps, an error of Euler's method would be seen half as large as it is, and its order as 1.6."""

Plan = tuple[str, int]
"""A solver and its number of steps."""


@dataclass(frozen=True)
class Evaluation:
    """One net evaluated with ``solver`` and ``steps`` steps in each ODE block.

    ``logit_error`` is ‖z − z*‖₂/‖z*‖₂ over all samples, with z* the logits of the reference solve, and infinite where a
    solve gives no numbers (which no accuracy counts as right); ``order`` is the slope of its logarithm from the
    evaluation of half as many steps (None where there is none). ``stage_errors`` and ``stage_orders`` are the same of
    the state after each ODE block, in the order of evaluation: one a stage in our ODE nets, and with what the stages
    before it have added. ``nfe`` counts the evaluations of f in one forward pass.
    """

    solver: str
    steps: int
    nfe: int
    accuracy: float
    loss: float
    logit_error: float
    order: float | None
    stage_errors: tuple[float, ...] = ()
    stage_orders: tuple[float | None, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The evaluation of which ``dataclasses.asdict`` (and JSON) made ``values``."""
        found = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name in ("loss", "logit_error"):
            found[name] = _number(found[name])
        found["stage_errors"] = tuple(map(_number, found.get("stage_errors", ())))
        return cls(**found)


def _number(value: float | None) -> float:
    """``value``; JSON has null for what is no number."""
    return math.nan if value is None else value


@dataclass(frozen=True)
class ConvergenceTable:
    """Evaluations on ``count`` samples against a reference solve of ``reference_steps`` steps of ``reference_solver``.

    ``trained`` has the solver and the steps of each ODE block as it was, ``stages`` the names of the blocks whose
    states are compared, in the order of evaluation.
    """

    count: int
    reference_steps: int
    reference_accuracy: float
    reference_loss: float
    trained: tuple[tuple[str, int | None], ...]
    evaluations: tuple[Evaluation, ...]
    reference_solver: str = "rk4"
    stages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ConvergenceTable":
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{
                **values,
                "reference_loss": _number(values["reference_loss"]),
                "trained": tuple((solver, steps) for solver, steps in values["trained"]),
                "evaluations": tuple(Evaluation.from_dict(e) for e in values["evaluations"]),
                "stages": tuple(values.get("stages", ())),
            }
        )


def convergence(
    net: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    steps: Sequence[int] | None = None,
    solvers: Sequence[str] | None = None,
    *,
    reference_steps: int | None = None,
    progress: bool = False,
) -> ConvergenceTable:
    """Logits, states, accuracy and loss of ``net`` with each solver and number of steps, against a reference solve.

    The reference is made by rk4; by Euler's method for projected dynamics, which no other makes.

    Args:
        net: a trained net with ODE blocks; its settings are restored afterwards.
        data: pairs (x, labels), gone through once.
        steps: numbers of steps; those of :func:`usual_steps` if None.
        solvers: fixed-step solvers; if None, the one of the net's first block (rk4 if that is adaptive).
        reference_steps: steps of the reference; twice the largest of ``steps`` if None (of Euler's method, 8 times).

    Raises:
        InvalidInput: for a net without ODE blocks, a solver without fixed steps, no steps, steps below 1 or whose grid
            steps over a breakpoint, or no data.
    """
    blocks = ode_blocks(net)
    if not blocks:
        raise InvalidInput(
            f"convergence in the number of steps needs a net with ODE blocks, and this {type(net).__name__} has none"
        )
    trained = tuple((block.solver, block.grid_steps) for block in blocks.values())
    own = trained[0][0] if trained[0][0] in TABLEAUX and trained[0][1] is not None else "rk4"
    solvers = tuple(choose(s, TABLEAUX, "fixed-step solver") for s in (solvers or (own,)))
    if steps is None:
        steps = usual_steps(net)
    if not steps:
        raise InvalidInput("convergence needs numbers of steps to evaluate the net with, and there is none")
    best = "euler" if any(isinstance(block, ProjectedODE) for block in blocks.values()) else "rk4"
    finest = (best, FINER[best] * max(steps) if reference_steps is None else reference_steps)
    plans = [(solver, n) for solver in solvers for n in sorted(steps)]
    for plan in (*plans, finest):
        _check(net, plan)
    reference, tallies = _Tally(), {plan: _Tally() for plan in plans}
    with _states_of(blocks) as states:
        for x, labels in tqdm(data, desc="convergence", leave=False, disable=None if progress else True):
            truth = _evaluate(net, x, finest, states)
            stages = tuple(name for name, _ in states)
            reference.add(truth, truth, labels, net)
            for plan, tally in tallies.items():
                tally.add(_evaluate(net, x, plan, states), truth, labels, net)
    if not reference.count:
        raise InvalidInput("convergence needs data to evaluate the net on, and there is none")
    errors = {plan: tally.errors for plan, tally in tallies.items()}
    return ConvergenceTable(
        count=reference.count,
        reference_steps=finest[1],
        reference_accuracy=reference.accuracy,
        reference_loss=reference.loss,
        trained=trained,
        evaluations=tuple(_evaluation(plan, tally, errors) for plan, tally in tallies.items()),
        reference_solver=best,
        stages=stages,
    )


def usual_steps(net: nn.Module) -> tuple[int, ...]:
    """n, 2n, 4n, … up to 64, with n the least number of steps whose grid steps over no breakpoint of any block.

    Without breakpoints (weights that are constant in t, or on a smooth basis) n is 1.

    Raises:
        InvalidInput: when no number up to 64 is one.
    """
    with evaluating(net):
        found = [n for n in range(1, MOST_STEPS + 1) if all(_fits(block, n) for block in ode_blocks(net).values())]
    if not found:
        points = sorted({point for block in ode_blocks(net).values() for point in block.breakpoints})
        raise InvalidInput(
            f"no equal steps, up to {MOST_STEPS} in each ODE block, have all of the breakpoints {points} as points: "
            "give the numbers of steps to evaluate the net with"
        )
    return tuple(found[0] * 2**k for k in range((MOST_STEPS // found[0]).bit_length()))


def _fits(block: ODEBlock, steps: int) -> bool:
    try:
        check_breakpoints(uniform_grid(block.t0, block.t1, steps), block.breakpoints)
    except InvalidInput:
        return False
    return True


def _check(net: nn.Module, plan: Plan) -> None:
    """Check that every block of ``net`` can be solved so, before anything is evaluated."""
    solver, steps = plan
    check_solver(solver, steps)
    with evaluating(net), solver_settings(net, solver=solver, steps=steps):
        for block in ode_blocks(net).values():
            block.scheme()


States = list[tuple[str, Tensor]]
"""The state after each ODE block, with the block's name, in the order of evaluation."""


@contextmanager
def _states_of(blocks: Mapping[str, ODEBlock]) -> Iterator[States]:
    """A list to which the ``blocks`` append the states that they give."""
    states: States = []

    def note(block: ODEBlock, inputs: Any, output: Tensor) -> None:
        states.append((names[block], output.clone()))  # what follows may overwrite it

    names = {block: name for name, block in blocks.items()}
    hooks = [block.register_forward_hook(note) for block in names]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _evaluate(net: nn.Module, x: Tensor, plan: Plan, states: States) -> list[Tensor]:
    """The states that ``net`` goes through from ``x``, left in ``states``, too, and the logits last."""
    solver, steps = plan
    states.clear()
    with evaluating(net), solver_settings(net, solver=solver, steps=steps, compile_mode=None):
        logits = net(x)
    return [*(state for _, state in states), logits]


@dataclass
class _Tally:
    """What one plan gives, summed up over the batches."""

    count: int = 0
    right: int = 0
    losses: float = 0.0
    nfe: int = 0
    off: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)

    def add(self, found: list[Tensor], truth: list[Tensor], labels: Tensor, net: nn.Module) -> None:
        """Add a batch, after its evaluation: states and logits ``found``, and those of the reference."""
        logits = found[-1]
        self.count += len(labels)
        self.right += int(right(logits, labels).sum())
        self.losses += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.nfe = sum(block.stats.nfe_forward for block in ode_blocks(net).values())
        nothing = [0.0] * len(truth)
        self.off = [sum_ + _square(h - g) for sum_, h, g in zip(self.off or nothing, found, truth, strict=True)]
        self.size = [sum_ + _square(g) for sum_, g in zip(self.size or nothing, truth, strict=True)]

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def loss(self) -> float:
        return self.losses / self.count

    @property
    def errors(self) -> tuple[float, ...]:
        """The relative error of each state, and of the logits last."""
        return tuple(math.sqrt(ratio(off, size)) for off, size in zip(self.off, self.size, strict=True))


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _evaluation(plan: Plan, tally: _Tally, errors: Mapping[Plan, tuple[float, ...]]) -> Evaluation:
    solver, steps = plan
    coarse = errors.get((solver, steps // 2)) if steps % 2 == 0 else None
    orders = [_order(a, b) for a, b in zip(coarse or [None] * len(errors[plan]), errors[plan], strict=True)]
    *stages, logits = zip(errors[plan], orders, strict=True)
    return Evaluation(
        solver=solver,
        steps=steps,
        nfe=tally.nfe,
        accuracy=tally.accuracy,
        loss=tally.loss,
        logit_error=logits[0],
        order=logits[1],
        stage_errors=tuple(error for error, _ in stages),
        stage_orders=tuple(order for _, order in stages),
    )


def _order(coarse: float | None, fine: float) -> float | None:
    """log2 of the error at half the steps over the error; None where one of them is 0, infinite, or not there."""
    if not (coarse and fine and math.isfinite(coarse) and math.isfinite(fine)):
        return None
    return math.log2(coarse) - math.log2(fine)
