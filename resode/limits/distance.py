"""How far the states of a net are from those of its ODE, step by step, beside what theory can promise.

At the points t_l of a block's grid the net has the states h_l, and the flow through the same input h(t_l). For a lifted
residual net the h_l are the states between its blocks. The error bound of one-step methods,

    ‖h_l − h(t_l)‖ ≤ max_j (d_j/Δ_j) · (e^{Λ (t_l − t_0)} − 1)/Λ,

has the local errors d_j = ‖Φ(h(t_j)) − h(t_{j+1})‖ of one step from the flow itself, and a Lipschitz constant Λ of f
(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, theorem II.3.4). For Euler's method
d_j/Δ_j ≤ ½ Δ_j max‖h″‖, and it is the bound of Sander, Ablin & Peyré 2022 (arXiv 2205.14612) for residual nets. Being
exponential in Λ it holds, and decides nothing: for the nets that are trained it is orders of magnitude above the
distance itself. Λ is taken along the trajectories, where it is at most the global one: a kind bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resode.blocks.ode import ODEBlock
from resode.blocks.projected import ProjectedODE
from resode.blocks.tableaux import TABLEAUX
from resode.dynamics import Increment
from resode.limits.comparison import ratio
from resode.limits.flow import Flow, flow_of, grid_of, steps_of
from resode.limits.record import Record
from resode.limits.samples import Data, take
from resode.limits.swap import reference_of
from resode.paths.linear import Linear

LIPSCHITZ_POINTS = 8
LIPSCHITZ_SAMPLES = 16
ITERATIONS = 10
"""Of the power method: the largest singular value to within some percent, from below."""


@dataclass(frozen=True)
class BlockDistance(Record):
    """One block.

    Args:
        name: the block's in the net.
        times: the points of its grid.
        states: root mean square over the samples of ‖h(t_l)‖.
        relative: root mean square of ‖h_l − h(t_l)‖, over that of ‖h(t_l)‖; infinite where a state is no number.
        largest: the largest ‖h_l − h(t_l)‖ of any sample.
        bound: the bound on it; None where the steps are not those of a one-step method on a fixed grid.
        lipschitz: Λ, the largest singular value of ∂f/∂h met along the flow.
        local: max d_j/Δ_j.
    """

    name: str
    times: tuple[float, ...]
    states: tuple[float, ...]
    relative: tuple[float, ...]
    largest: tuple[float, ...]
    bound: tuple[float, ...] | None
    lipschitz: float | None
    local: float | None


@dataclass(frozen=True)
class Distance(Record):
    """The blocks of a net on ``count`` samples."""

    count: int
    blocks: tuple[BlockDistance, ...]

    @property
    def worst(self) -> float:
        """The largest relative distance of any block at any time."""
        return max(math.inf if math.isnan(d) else d for block in self.blocks for d in block.relative)


def distance(net: nn.Module | Flow, data: Data, *, samples: int = 64) -> Distance:
    """The states of each block along its grid against its flow, from what the net gives it.

    The flow is that of the reference solve of ``limits.swap``. Each block begins where the net, as it is used, begins
    it: errors of earlier blocks are not carried on. A reversible or multistep solver begins anew at each point of the
    grid, so that its states there are those of single steps (see :meth:`ODEBlock.trajectory`).

    Args:
        net: with ODE blocks; a residual net is lifted, and its states between its blocks are looked at.
        data: pairs (x, labels); the first ``samples`` are used.

    Raises:
        InvalidInput: for a net that cannot be lifted, or uses an ODE block twice.
    """
    flow = flow_of(net)
    x = torch.cat([x for x, _ in take(data, samples)])
    with flow.solving():
        entries = flow.entries(x)
        found = {name: block.trajectory(entries[name], grid_of(block)) for name, block in flow.named.items()}
        steps = {name: steps_of(block) for name, block in flow.named.items()}
        grids = {name: grid_of(block) for name, block in flow.named.items()}
    solver, factor = reference_of(flow)
    with flow.solving(factor, None if solver == "as trained" else solver):
        exact = {name: block.trajectory(entries[name], grids[name]) for name, block in flow.named.items()}
    with flow.solving():
        return Distance(
            len(x),
            tuple(
                _of_block(name, block, grids[name], found[name], exact[name], steps[name])
                for name, block in flow.named.items()
            ),
        )


def _of_block(
    name: str,
    block: ODEBlock,
    times: tuple[float, ...],
    found: Tensor,
    exact: Tensor,
    steps: Sequence[tuple[float, float]] | None,
) -> BlockDistance:
    off, size = (found - exact).flatten(2).double().norm(dim=2), exact.flatten(2).double().norm(dim=2)
    mean = size.square().mean(1).sqrt()
    bound = lipschitz = local = None
    if steps is not None:
        local = max(_local_error(block, step, *exact[i : i + 2]) for i, step in enumerate(steps))
        lipschitz = _lipschitz(block, steps, exact)
        bound = tuple(local * _growth(lipschitz, t - times[0]) for t in times)
    return BlockDistance(
        name=name,
        times=times,
        states=tuple(mean.tolist()),
        relative=tuple(map(ratio, off.square().mean(1).sqrt().tolist(), mean.tolist())),
        largest=tuple(off.amax(1).tolist()),
        bound=bound,
        lipschitz=lipschitz,
        local=local,
    )


def _growth(rate: float, t: float) -> float:
    """(e^{Λt} − 1)/Λ, which is t for Λ = 0."""
    if rate * t > 700.0:  # beyond the numbers
        return math.inf
    return math.expm1(rate * t) / rate if rate > 0.0 else t


def _increment(block: ODEBlock, step: tuple[float, float]) -> Increment:
    return Increment(block.branch, TABLEAUX[block.solver], *step, (block.t0, block.t1))


def _local_error(block: ODEBlock, step: tuple[float, float], h: Tensor, after: Tensor) -> float:
    """max over the samples of ‖Φ(h) − h(t + Δ)‖/Δ."""
    made = h + _increment(block, step)(step[0], h)
    off = (block.project(made) if isinstance(block, ProjectedODE) else made) - after
    return float(off.flatten(1).double().norm(dim=1).amax()) / (step[1] - step[0])


def _lipschitz(block: ODEBlock, steps: Sequence[tuple[float, float]], exact: Tensor) -> float:
    """The largest singular value of ∂f/∂h at some of the states, by the power method on (∂f/∂h)ᵀ ∂f/∂h."""
    stride = max(1, math.ceil(len(steps) / LIPSCHITZ_POINTS))
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for i in range(0, len(steps), stride):
        step, h = steps[i], exact[i, :LIPSCHITZ_SAMPLES]
        solve = _increment(block, step).solve()
        slope = Linear(lambda h, solve=solve, t=step[0]: solve(t, (h,))[0], h)
        u = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
        for _ in range(ITERATIONS):
            u = _unit(u)
            (image,) = slope.push([u])
            if image is None:
                break
            (u,) = slope.pull([image])
            if u is None:
                break
            largest = max(largest, float(image.flatten(1).norm(dim=1).amax()))
    return largest


def _unit(u: Tensor) -> Tensor:
    """``u`` with each sample of norm 1."""
    norms = u.flatten(1).norm(dim=1).clamp(min=torch.finfo(u.dtype).tiny)
    return u / norms.view(-1, *[1] * (u.ndim - 1))
