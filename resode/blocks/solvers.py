"""Explicit Runge–Kutta methods on fixed grids: tableaux, one step, a whole solve.

A method with coefficients (a, b, c) makes the step from t to t + Δ by

    k_i = f(t + c_i Δ, h + Δ Σ_{j<i} a_ij k_j),    h(t + Δ) = h + Δ Σ_i b_i k_i

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, eq. II.1.8). A grid is given by its N + 1 points,
never by a float step size, so that it has exactly N steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from resode.errors import InvalidInput
from resode.layers.context import Field, SolveContext


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method; ``a`` is given by its rows below the diagonal, the first one empty."""

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def stages(self) -> int:
        return len(self.b)


TABLEAUX = {
    tableau.name: tableau
    for tableau in (
        Tableau("euler", 1, ((),), (1.0,), (0.0,)),
        Tableau("midpoint", 2, ((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
        Tableau("heun", 2, ((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
        Tableau(
            "rk4", 4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)
        ),
    )
}


@dataclass
class SolveStats:
    """What the last solve cost: evaluations of f forward and backward, steps accepted and rejected."""

    nfe_forward: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass
class Solve:
    """One solve in progress: the branch in its context, with the evaluations counted."""

    branch: Field
    context: SolveContext
    stats: SolveStats = field(default_factory=SolveStats)

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        """f(t, h), counted as a forward evaluation.

        Raises:
            InvalidInput: when the branch changes the shape of the state.
        """
        self.stats.nfe_forward += 1
        out = self.context.evaluate(self.branch, t, h)
        if out.shape != h.shape:
            raise InvalidInput(
                f"the branch turns a state of shape {tuple(h.shape)} into {tuple(out.shape)}: the vector field of an "
                "ODE must keep the shape; change the shape in a transition before or after the block"
            )
        return out


class Scheme(Protocol):
    """A way from one end of an interval to the other."""

    def integrate(self, f: Solve, h: Tensor) -> Tensor:
        """The state at the end of the interval, from the state ``h`` at its start."""
        ...


def axpy(h: Tensor, step: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """h + step·Σ weights·slopes, by plain additions (nothing is stacked)."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            h = torch.add(h, slope, alpha=step * weight)
    return h


def stage_slopes(
    f: Callable[[float, Tensor], Tensor], tableau: Tableau, t: float, end: float, h: Tensor
) -> list[Tensor]:
    """k_1 … k_s of the step from ``t`` to ``end``, from the state ``h`` at ``t``."""
    slopes: list[Tensor] = []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        slopes.append(f(stage_time(t, end, c), axpy(h, end - t, row, slopes)))
    return slopes


def stage_time(t: float, end: float, c: float) -> float:
    """t + c·(end − t), which is ``end`` itself for c = 1, whatever the rounding."""
    return end if c == 1.0 else t + c * (end - t)


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

    def integrate(self, f: Solve, h: Tensor) -> Tensor:
        for start, end in pairwise(self.grid):
            f.context.begin_step(start, end)
            h = axpy(h, end - start, self.tableau.b, stage_slopes(f, self.tableau, start, end, h))
            f.context.accept_step()
            f.stats.accepted += 1
        return h
