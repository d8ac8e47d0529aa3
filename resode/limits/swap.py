"""Solver swaps: does a net give the same answers whichever solver, accurate enough, its blocks are solved by?

A net whose blocks are flows does: refining its grid changes its logits by about the error of the grid, which falls at
the solver's order. One that has fitted its own grid does not: on a finer grid, or by a solver of higher order, it is
another net (Ott et al. 2021, arXiv 2007.15386; Queiruga et al. 2020, arXiv 2008.02389).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput
from resode.limits.comparison import ratio, relative, right
from resode.limits.flow import Flow, flow_of
from resode.limits.record import Record
from resode.limits.samples import Batches, Data, take
from resode.limits.thresholds import LOSS_OF_ACCURACY

REFINED = (2.0, 4.0)
SOLVERS = ("euler", "midpoint", "rk4")
REFERENCE_FACTOR = 5.0
"""No power of 2: a field that wiggles between the points of a grid and of the doubled ones does not look smooth."""
REFERENCE_FACTOR_ALONE = 20.0
"""Where no solver but the net's own, of a low order, will do: as many evaluations of f as 5 times the steps of rk4."""
HIGH_ORDER = 4
NUDGE = 1e-3
"""Size of the random change of the inputs that tells how sensitive the logits are, relative to the inputs."""


@dataclass(frozen=True)
class Solved(Record):
    """The net with its blocks solved in one way.

    Args:
        solver: the solver; "as trained" for those of the net.
        factor: how many times as many steps as the net is used with.
        steps: of each block; None where a block chooses them.
        nfe: evaluations of f in one forward pass (of the last batch).
        accuracy, loss: over all samples; the loss is the mean cross-entropy.
        error: ‖z − z*‖/‖z*‖ over all samples, with z* the logits of the reference solve.
        change: ‖z − z₁‖/‖z₁‖, with z₁ the logits of the net as it is used.
        flips: share of the samples that it classifies otherwise than the net as it is used.
        lost: accuracy of the net as it is used, minus the accuracy here.
        lost_margin: half the 95% interval of that difference over the choice of samples, which are the same for both:
            1.96·√((a + b − (a − b)²/n)/n²), with a and b the numbers of samples that one alone gets right.
    """

    solver: str
    factor: float
    steps: tuple[int | None, ...]
    nfe: int
    accuracy: float
    loss: float
    error: float
    change: float
    flips: float
    lost: float
    lost_margin: float


@dataclass(frozen=True)
class Swap(Record):
    """What other solvers and steps make of a net.

    Args:
        count: number of samples.
        used: solver and steps of each block, as the net is used; steps None where it chooses them.
        order: of the net's own solver, the least of the blocks'.
        sensitivity: relative change of the logits by a small random relative change of the inputs, as a factor. The
            logits of different solves cannot agree to less than it times the unit of rounding.
        rounding: that product.
        reference: the reference solve.
        evaluations: the net as it is used (factor 1, "as trained") and every other evaluation.
        critical: the least factor from which on, up to the finest grid, the net's own solver is as accurate as the
            reference and as the net is used, to 1%: with fewer steps it collapses. None where there is no such factor:
            the finest grid is not fine enough, or the net is nothing but on its own.
        critical_steps: the steps of each block at that factor.
    """

    count: int
    used: tuple[tuple[str, int | None], ...]
    order: int
    sensitivity: float
    rounding: float
    reference: Solved
    evaluations: tuple[Solved, ...]
    critical: float | None
    critical_steps: tuple[int | None, ...] | None

    def own(self, factor: float = 1.0) -> Solved | None:
        """The net's own solver with ``factor`` times the steps; None if that was not evaluated."""
        return next((e for e in self.evaluations if e.solver == "as trained" and e.factor == factor), None)

    @property
    def observed_order(self) -> float | None:
        """log2 of the error as the net is used over the error with twice the steps; None where there is none."""
        one, two = self.own(1.0), self.own(2.0)
        if one is None or two is None or not (one.error > 0.0 and two.error > 0.0):
            return None
        order = math.log2(one.error) - math.log2(two.error)
        return order if math.isfinite(order) else None


def swap(
    net: nn.Module | Flow, data: Data, *, solvers: Sequence[str] = SOLVERS, samples: int = 512, progress: bool = False
) -> Swap:
    """Evaluate a net with other solvers and other numbers of steps than its own.

    Its own solver is evaluated with 2 and 4 times the steps, and with ½, ¼, … of them as far as they are whole numbers
    and breakpoints allow; each of ``solvers`` with the steps as they are. The reference solve is rk4's with 5 times the
    steps; the net's own solver's where that is of order 4 or higher; and where rk4 cannot solve the blocks, its own's
    with 20 times the steps.

    Args:
        net: with ODE blocks; a residual net is lifted.
        data: pairs (x, labels); the first ``samples`` are used.
        solvers: solvers to try.

    Raises:
        InvalidInput: for a net that cannot be lifted, an unknown solver, or data that do not do.
    """
    for solver in solvers:
        if solver not in TABLEAUX:
            raise InvalidInput(f"unknown solver {solver!r} to swap in: choose from {', '.join(TABLEAUX)}")
    flow, batches = flow_of(net), take(data, samples)
    plans = [("as trained", 1.0), *_plans(flow, solvers)]
    reference = reference_of(flow)
    found: dict[tuple[str, float], tuple[Tensor, tuple[int | None, ...], int]] = {}
    bar = tqdm([reference, *plans], desc="solver swaps", leave=False, disable=None if progress else True)
    for solver, factor in bar:
        with flow.solving(factor, None if solver == "as trained" else solver):
            logits = torch.cat([flow.net(x) for x, _ in batches]).double()
            steps = tuple(block.grid_steps for block in flow.blocks)
            found[solver, factor] = logits, steps, sum(block.stats.nfe_forward for block in flow.blocks)
    labels = torch.cat([labels for _, labels in batches])
    exact, used = found[reference][0], found["as trained", 1.0][0]
    solved = {plan: _solved(*plan, *found[plan], labels, exact, used) for plan in (reference, *plans)}
    sensitivity = _sensitivity(flow, batches, used)
    critical = _critical(solved, reference)
    return Swap(
        count=len(labels),
        used=tuple((block.solver, block.grid_steps) for block in flow.blocks),
        order=flow.order,
        sensitivity=sensitivity,
        rounding=sensitivity * torch.finfo(batches[0][0].dtype).eps,
        reference=solved[reference],
        evaluations=tuple(solved[plan] for plan in plans),
        critical=critical,
        critical_steps=None if critical is None else solved["as trained", critical].steps,
    )


def _plans(flow: Flow, solvers: Sequence[str]) -> Iterator[tuple[str, float]]:
    factor = 0.5
    while flow.allows(factor) and any(block.grid_steps is not None for block in flow.blocks):
        yield "as trained", factor
        factor /= 2
    yield from (("as trained", factor) for factor in REFINED)
    own = {block.solver for block in flow.blocks}
    yield from ((solver, 1.0) for solver in solvers if {solver} != own and flow.allows(1.0, solver))


def reference_of(flow: Flow) -> tuple[str, float]:
    """Solver and factor of the reference solve: "as trained", or rk4."""
    adaptive = any(block.grid_steps is None for block in flow.blocks)
    if adaptive or flow.order >= HIGH_ORDER:
        return "as trained", REFERENCE_FACTOR
    if flow.allows(REFERENCE_FACTOR, "rk4"):
        return "rk4", REFERENCE_FACTOR
    return "as trained", REFERENCE_FACTOR_ALONE


def _solved(
    solver: str,
    factor: float,
    logits: Tensor,
    steps: tuple[int | None, ...],
    nfe: int,
    labels: Tensor,
    exact: Tensor,
    used: Tensor,
) -> Solved:
    n = len(labels)
    here, there = (right(z, labels) for z in (logits, used))
    lost, gained = int((there & ~here).sum()), int((here & ~there).sum())
    return Solved(
        solver=solver,
        factor=factor,
        steps=steps,
        nfe=nfe,
        accuracy=float(here.double().mean()),
        loss=float(F.cross_entropy(logits, labels)),
        error=relative(logits, exact),
        change=relative(logits, used),
        flips=float((logits.argmax(1) != used.argmax(1)).double().mean()),
        lost=(lost - gained) / n,
        lost_margin=1.959963984540054 * math.sqrt(lost + gained - (lost - gained) ** 2 / n) / n,
    )


def _critical(solved: dict[tuple[str, float], Solved], reference: tuple[str, float]) -> float | None:
    """The least factor from which on the net's own solver is as accurate as the reference, and as the net is used."""
    needed = max(solved[reference].accuracy, solved["as trained", 1.0].accuracy) - LOSS_OF_ACCURACY
    own = [factor for solver, factor in solved if solver == "as trained" and (solver, factor) != reference]
    critical = None
    for factor in sorted(own, reverse=True):
        if solved["as trained", factor].accuracy < needed:
            break
        critical = factor
    return critical


def _sensitivity(flow: Flow, batches: Batches, used: Tensor) -> float:
    """‖δz‖/‖z‖ over ‖δx‖/‖x‖ for a small random δx."""
    generator = torch.Generator().manual_seed(0)
    nudged, sizes, norms = [], 0.0, 0.0
    with flow.solving():
        for x, _ in batches:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            nudge = noise * (NUDGE * x.norm() / noise.norm())
            nudged.append(flow.net(x + nudge))
            sizes += float(nudge.double().square().sum())
            norms += float(x.double().square().sum())
    return ratio(relative(torch.cat(nudged), used), math.sqrt(ratio(sizes, norms)))
