"""A continuous net as an ordinary residual net: each step of a solver as a block with weights of its own.

On the grid t_0 < … < t_N a step of a Runge–Kutta method with the tableau (a, b, c) is the residual block

    h_{n+1} = h_n + Δ·g_n(h_n),    g_n(h) = Σ_i b_i k_i,    k_i = f_{n,i}(h + Δ Σ_{j<i} a_ij k_j),

where f_{n,i}(h) = f(t_n + c_i Δ, h) has the weights θ(t_n + c_i Δ) and the running statistics of that time, as
parameters and buffers that no longer depend on it. For Euler's method g_n = f(t_n, ·), and the net is a ResNet like any
other.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.blocks.derived import Held, Scaled, Varying, frozen
from resode.blocks.ode import ODEBlock, ode_blocks
from resode.blocks.projected import ProjectedODE
from resode.blocks.residual import ResidualBlock
from resode.blocks.settings import check_count
from resode.blocks.solvers import check_breakpoints, stage_time, uniform_grid
from resode.blocks.tableaux import EULER, TABLEAUX, Tableau
from resode.errors import InvalidInput, choose
from resode.layers.context import SolveContext, current
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout
from resode.layers.factors import multiply_out
from resode.nets.sequences import spliced


def discretize(net: nn.Module, steps: int | None = None, solver: str | None = None) -> nn.Module:
    """A copy of ``net`` in which each ODE block is the residual blocks of its steps; it runs without any solver.

    It equals ``net`` solved by ``solver`` with ``steps`` steps, in evaluation mode. In training it is another net: each
    block has weights, and batch statistics, of its own. Its masks of dropout are drawn once a step and serve all the
    stages of that step, as with one mask interval a step. Penalties and random ends of a solve are left out.

    Args:
        net: any net with ODE blocks.
        steps: equal steps for each block; as many as the block itself makes if None.
        solver: a Runge–Kutta method of ``blocks.tableaux``; the block's own if None.

    Raises:
        InvalidInput: for a net without ODE blocks, a solver that is no Runge–Kutta method (or, for projected dynamics,
            not Euler's), a reversible block, no number of steps where a block chooses its own, and a grid that steps
            over a breakpoint.
    """
    if not ode_blocks(net):
        raise InvalidInput(f"this {type(net).__name__} has no ODE block to discretize")
    if solver is not None:
        choose(solver, TABLEAUX, "Runge-Kutta method")
    net = copy.deepcopy(net)
    multiply_out(net)
    plans = [(block, *_plan(block, steps, solver)) for block in ode_blocks(net).values()]
    return spliced(net, {block: _discrete(block, grid, tableau) for block, grid, tableau in plans})


def _plan(block: ODEBlock, steps: int | None, solver: str | None) -> tuple[tuple[float, ...], Tableau]:
    """The grid and method for ``block``."""
    if block.gradient == "reversible":
        raise InvalidInput(
            "an ODE block is reversible: its steps act on two coupled states, and are no residual blocks; discretize "
            "the net within resode.solver_settings(net, gradient='backprop'), by the method itself"
        )
    steps = block.grid_steps if steps is None else steps
    if steps is None:
        raise InvalidInput(f"{block.solver} chooses its steps, which differ from batch to batch: pass steps=32, say")
    check_count(steps, "steps")
    tableau = TABLEAUX[choose(block.solver if solver is None else solver, TABLEAUX, "Runge-Kutta method")]
    if isinstance(block, ProjectedODE) and tableau is not EULER:
        raise InvalidInput(f"projected dynamics are made by solver='euler' alone, not {tableau.name!r}")
    grid = uniform_grid(block.t0, block.t1, steps)
    check_breakpoints(grid, getattr(block.branch, "breakpoints", ()))
    return grid, tableau


def _discrete(block: ODEBlock, grid: Sequence[float], tableau: Tableau) -> list[nn.Module]:
    """What stands for ``block``."""
    make = _euler_step if tableau is EULER else _step
    steps: list[nn.Module] = [make(block, start, end, tableau) for start, end in pairwise(grid)]
    for step in steps:
        step.training = block.training
    extra = block.extra_channels
    return [AddChannels(extra), *steps, DropChannels(extra)] if extra else steps


def _euler_step(block: ODEBlock, start: float, end: float, tableau: Tableau) -> ResidualBlock:
    """h + Δ·f(t, h), with what multiplies f taken into the scale."""
    branch, t, scale = _at(block, start, start, end), start, end - start
    if isinstance(branch, Scaled):
        gain, branch = branch.gain[0], branch.branch
        scale = scale * gain.factor * (1.0 if gain.weight is None else gain.weight.detach())
        if isinstance(scale, Tensor):
            scale = nn.Parameter(scale) if gain.weight.requires_grad else float(scale)
    if isinstance(branch, Varying):
        branch = branch.layers[0]
    if isinstance(branch, Held):
        branch, t = branch.branch, branch.at
    post = copy.deepcopy(block.post) if isinstance(block, ProjectedODE) else None
    made = ResidualBlock(branch, scale="skipinit" if isinstance(scale, Tensor) else scale, post=post, t=t)
    made.scale = scale
    return made


def _step(block: ODEBlock, start: float, end: float, tableau: Tableau) -> ResidualBlock:
    """h + Δ·Σ b_i k_i."""
    times = [stage_time(start, end, c) for c in tableau.c[: tableau.solution_stages]]
    branch = Increments([_at(block, t, start, end) for t in times], tableau, start, end)
    branch.training = block.training
    return ResidualBlock(branch, scale=end - start, t=start)


def _at(block: ODEBlock, t: float, start: float, end: float) -> nn.Module:
    """The field at a stage at time ``t`` of the step from ``start`` to ``end``."""
    return frozen(block.branch, t, inside=0.5 * (start + end))


class Increments(nn.Module):
    """Σ_i b_i k_i of one step: the branch of a residual block that is the step of a Runge–Kutta method.

    Args:
        stages: the fields f_i of the stages. They share their dropout from now on, whose mask is that of the step.
        tableau: the method; it needs as many stages as there are fields.
        start, end: ends of the step, whatever time the branch is called with.
    """

    def __init__(self, stages: Sequence[nn.Module], tableau: Tableau, start: float, end: float) -> None:
        super().__init__()
        for name, layer in stages[0].named_modules():
            if isinstance(layer, Dropout):
                for stage in stages[1:]:
                    stage.set_submodule(name, layer)
            elif isinstance(layer, Conv2d | Linear) and layer.dropconnect:
                # The weights are those of a stage, the mask is that of the step.
                key = object()
                for stage in stages:
                    stage.get_submodule(name).mask_key = key
        self.stages = nn.ModuleList(stages)
        self.tableau, self.start, self.end = tableau, start, end

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        context = current() or SolveContext(single=True)
        if context.single:
            context.begin_step(self.start, self.end)
        slopes: list[Tensor] = []
        for stage, row, c in zip(self.stages, self.tableau.a, self.tableau.c, strict=False):
            x = _sum(h, [self.step * a for a in row], slopes)
            slopes.append(context.evaluate(stage, stage_time(self.start, self.end, c), x))
        first, *rest = self.tableau.b[: len(slopes)]
        return _sum(first * slopes[0], rest, slopes[1:])

    @property
    def step(self) -> float:
        """Δ."""
        return self.end - self.start

    def extra_repr(self) -> str:
        return f"{self.tableau.name}, from {self.start:g} to {self.end:g}"


def _sum(h: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """h + Σ weights·slopes."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            h = torch.add(h, slope, alpha=weight)
    return h


class AddChannels(nn.Module):
    """``extra`` channels of zeros after those of h, (B, C) or (B, C, H, W)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, h: Tensor) -> Tensor:
        return F.pad(h, (0, 0) * (h.ndim - 2) + (0, self.extra))

    def extra_repr(self) -> str:
        return str(self.extra)


class DropChannels(nn.Module):
    """h without its last ``extra`` channels."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, h: Tensor) -> Tensor:
        return h[:, : -self.extra]

    def extra_repr(self) -> str:
        return str(self.extra)
