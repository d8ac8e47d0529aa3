"""Steps of an ODE block: those of its solver on a grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor

from resode.blocks.ode import ODEBlock
from resode.blocks.projected import ProjectedODE
from resode.blocks.solvers import Solve, check_breakpoints, rk_step, uniform_grid
from resode.blocks.tableaux import TABLEAUX, Tableau
from resode.dynamics.step import Step, identity
from resode.errors import InvalidInput
from resode.layers.context import Field, SolveContext

Grid = int | Sequence[float]
"""Equal steps, or the points of a grid."""


@dataclass(frozen=True)
class Increment:
    """Branch of a solver's step: (t, h) ↦ Δ Σ_i b_i k_i from ``t`` to ``end``."""

    field: Field
    tableau: Tableau
    t: float
    end: float
    interval: tuple[float, float]

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        return rk_step(self.solve(), self.tableau, self.t, self.end, (h,), base=(torch.zeros_like(h),)).state[0]

    def solve(self) -> Solve:
        """A solve in which this step has begun: what evaluates the field, as a function of (t, state)."""
        solve = Solve(self.field, SolveContext(*self.interval))
        solve.begin_step(self.t, self.end)
        return solve


def read_ode(
    block: ODEBlock, stage: int, label: str, grid: Grid | None = None, accepted: Sequence[float] | None = None
) -> Iterator[Step]:
    """The steps of ``block`` on ``grid``, or on its own fixed grid, or at the points that it ``accepted``.

    Raises:
        InvalidInput: for settings that make no sense, a solver without steps of its own, a reversible block, no grid,
            or one that does not span the block's interval or steps over a breakpoint.
    """
    block.check_settings()
    _refuse_other_steps(block, label)
    points = _points(block, label, grid, accepted)
    _check_points(block, label, points)
    extra = block.extra_channels
    if extra:
        yield Step(kind="transition", branch=lambda t, h: block.augment(h), stage=stage, label=f"{label} augment")
    tableau = TABLEAUX[block.solver]
    post = block.post if isinstance(block, ProjectedODE) else identity
    for start, end in pairwise(points):
        branch, at = Increment(block.branch, tableau, start, end, (block.t0, block.t1)), f"{label} t={start:.3g}"
        yield Step(kind="residual", branch=branch, post=post, stage=stage, t=start, end=end, label=at)
    if extra:
        yield Step(kind="transition", branch=lambda t, h: h[:, :-extra], stage=stage, label=f"{label} project")


def _points(block: ODEBlock, label: str, grid: Grid | None, accepted: Sequence[float] | None) -> tuple[float, ...]:
    if isinstance(grid, Integral):
        if grid < 1:
            raise InvalidInput(f"grid is {grid} steps: at least 1 is needed")
        return uniform_grid(block.t0, block.t1, int(grid))
    if isinstance(grid, Real):
        raise InvalidInput(f"grid is {grid!r}: a whole number of steps, or the points of a grid, is expected")
    if grid is not None:
        return tuple(float(t) for t in grid)
    if block.grid_steps is not None:
        return uniform_grid(block.t0, block.t1, block.grid_steps)
    if accepted is not None:
        return tuple(accepted)
    raise InvalidInput(
        f"the ODE block {label} is solved by {block.solver} with steps of its choice, which differ from batch to "
        "batch: pass grid=32 (equal steps), the points of a grid, or an example on which to find the steps it makes"
    )


def _refuse_other_steps(block: ODEBlock, label: str) -> None:
    if block.solver not in TABLEAUX:
        raise InvalidInput(
            f"the ODE block {label} is solved by {block.solver}, whose steps do not follow from the state before them "
            "alone: read the net within resode.solver_settings(net, solver='rk4', steps=32), say"
        )
    if block.gradient == "reversible":
        raise InvalidInput(
            f"the ODE block {label} is reversible: its steps act on two coupled states, and are no residual steps; "
            "read the net within resode.solver_settings(net, gradient='backprop'), say"
        )


def _check_points(block: ODEBlock, label: str, points: Sequence[float]) -> None:
    rising = len(points) > 1 and all(a < b for a, b in pairwise(points))
    if not rising or points[0] != block.t0 or points[-1] != block.t1:
        raise InvalidInput(
            f"the grid {list(points)} of the ODE block {label}: its points must rise from {block.t0:g} to {block.t1:g}"
        )
    check_breakpoints(points, block.breakpoints)
