"""Reconstruction: integrate forward, then backward. How far is what comes back from what was put in?

A flow has an inverse, and a solver that follows it forward from h to y follows it backward from y to h but for its
error. That error has two causes, which halving the step tells apart. *Discretization* falls at the solver's order: for
a Runge–Kutta method Φ of order p, forward by Φ_Δ and backward by Φ_{−Δ}, each step leaves C Δ^{p+1} + C (−Δ)^{p+1} +
O(Δ^{p+2}), so that the whole falls as Δ^p for odd p and, the leading terms cancelling, as Δ^{p+1} for even p.
*Ill-conditioning* does not: a flow that contracts by a factor amplifies, on its way back, every error of the end by
that factor, the rounding of the end included.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resode.blocks.ode import ODEBlock
from resode.limits.comparison import relative
from resode.limits.flow import Flow, flow_of, order_of
from resode.limits.record import Record
from resode.limits.samples import Data, take

FACTORS = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class BlockReconstruction(Record):
    """One block.

    Args:
        name: the block's in the net.
        solver: its solver.
        steps: its steps as it is used; None where it chooses them.
        order: by which its error should fall: p for odd p, p + 1 for even p.
        errors: ‖ĥ − h‖/‖h‖ over all samples, with h the block's input and ĥ what comes back, with 1, 2 and 4 times the
            steps.
        amplification: change of ĥ, relative to h, by a small random relative change of y, as a factor.
        rounding: the amplification times the unit of rounding: less than that no error can be.
    """

    name: str
    solver: str
    steps: int | None
    order: int
    errors: tuple[float, ...]
    amplification: float
    rounding: float

    @property
    def observed_orders(self) -> tuple[float | None, ...]:
        """log2 of each error over the next."""
        return tuple(_order(*self.errors[i : i + 2]) for i in range(len(self.errors) - 1))


@dataclass(frozen=True)
class Reconstruction(Record):
    """The blocks of a net, on ``count`` samples, with ``factors`` times the steps."""

    count: int
    factors: tuple[float, ...]
    blocks: tuple[BlockReconstruction, ...]


def reconstruction(net: nn.Module | Flow, data: Data, *, samples: int = 64) -> Reconstruction:
    """Integrate each ODE block of ``net`` forward from what it is given for the ``data``, and backward from there.

    Args:
        net: with ODE blocks; a residual net is lifted.
        data: pairs (x, labels); the first ``samples`` are used.

    Raises:
        InvalidInput: for a net that cannot be lifted, or whose blocks have no inverse: those of projected dynamics.
    """
    flow = flow_of(net)
    x = torch.cat([x for x, _ in take(data, samples)])
    with flow.solving():
        entries = flow.entries(x)
    errors: dict[str, list[float]] = {name: [] for name in entries}
    amplifications: dict[str, float] = {}
    for factor in FACTORS:
        with flow.solving(factor):
            for name, block in flow.named.items():
                h = block.augment(entries[name])
                end = block.trajectory(entries[name], [block.t1])[0]
                back = block.inverse(end)
                errors[name].append(relative(back, h))
                if factor == FACTORS[-1]:
                    amplifications[name] = _amplification(block, h, end, back)
    eps = torch.finfo(x.dtype).eps
    return Reconstruction(
        len(x),
        FACTORS,
        tuple(
            BlockReconstruction(
                name=name,
                solver=block.solver,
                steps=block.grid_steps,
                order=_expected(block),
                errors=tuple(errors[name]),
                amplification=amplifications[name],
                rounding=amplifications[name] * eps,
            )
            for name, block in flow.named.items()
        ),
    )


def _expected(block: ODEBlock) -> int:
    order = order_of(block)
    return order if order % 2 else order + 1


def _amplification(block: ODEBlock, h: Tensor, end: Tensor, back: Tensor) -> float:
    """‖δĥ‖/‖h‖ over ‖δy‖/‖y‖ for a small random δy."""
    noise = torch.randn(end.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(end)
    size = math.sqrt(torch.finfo(end.dtype).eps)
    nudge = noise * (size * end.norm() / noise.norm())
    return relative(h + block.inverse(end + nudge) - back, h) / size


def _order(coarse: float, fine: float) -> float | None:
    if not (0.0 < coarse < math.inf and 0.0 < fine < math.inf):
        return None
    return math.log2(coarse) - math.log2(fine)
