"""Projected dynamics: Euler's steps, each followed by a map such as ReLU.

The residual block of He et al. 2016 (arXiv 1512.03385), h ← ReLU(h + f(h)), is an Euler step of no vector field: its
state never leaves the non-negative cone, whatever f says. It is a step of a projected dynamical system,
h ← P(h + Δ·f(t, h)), whose limit is dh/dt = f(t, h) inside the cone, and the projection of that on its boundary (Dupuis
& Nagurney 1993, Ann. Oper. Res. 44). The limit has a kink wherever a trajectory meets the boundary, and no inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from resode.blocks.ode import ODEBlock
from resode.blocks.solvers import FixedGrid, RightHandSide, Scheme, State, StepMap, Watch
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput


@dataclass(frozen=True)
class ProjectedGrid(FixedGrid):
    """Steps of a tableau from point to point, after each of which h is projected."""

    project: Callable[[Tensor], Tensor]

    def integrate(self, f: RightHandSide, state: State, step: StepMap, watch: Watch | None = None) -> State:
        for start, end in pairwise(self.grid):
            f.begin_step(start, end)
            h, *integrals = step(f, start, end, state).state
            f.accept_step()
            if watch is not None:
                watch(start, end, state)
            state = (self.project(h), *integrals)
        return state


class ProjectedODE(ODEBlock):
    """x ↦ h(t1) by the steps h ← post(h + Δ·f(t, h)).

    Args:
        branch: f, as for :class:`ODEBlock`.
        post: the projection, a map of the state that keeps its shape and draws nothing at random: nn.ReLU(), say.
        steps: number of equal steps.
        settings: as for :class:`ODEBlock`, but that the solver is Euler's and the gradient backpropagation's.

    Raises:
        InvalidInput: as :class:`ODEBlock`; for any other solver or gradient mode; and from :meth:`inverse`, as a
            projection has none.
    """

    def __init__(self, branch: nn.Module, post: nn.Module, steps: int | None = None, **settings: Any) -> None:
        super().__init__(branch, settings.pop("solver", "euler"), steps, **settings)
        self.post = post

    def inverse(self, y: Tensor) -> Tensor:
        """Refused.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(
            f"projected dynamics have no inverse: the {type(self.post).__name__} after each step takes several states "
            "to one"
        )

    def project(self, h: Tensor) -> Tensor:
        """post(h).

        Raises:
            InvalidInput: when the shape is another.
        """
        out = self.post(h)
        if out.shape != h.shape:
            raise InvalidInput(
                f"the projection turns a state of shape {tuple(h.shape)} into {tuple(out.shape)}: it must keep the "
                "shape"
            )
        return out

    def check_settings(self) -> None:
        """As :class:`ODEBlock`'s, and that the solver is Euler's and the gradient backpropagation's."""
        super().check_settings()
        if self.solver != "euler":
            raise InvalidInput(
                f"projected dynamics, post(h + Δ·f) at each step, are made by solver='euler' alone, and "
                f"{self.solver!r} was asked for: no field has them for its flow, so no other solver approximates them; "
                "to compare solvers train a net of kind 'preact'"
            )
        if self.gradient != "backprop":
            raise InvalidInput(f"projected dynamics are differentiated by gradient='backprop', not {self.gradient!r}")

    def _on_grid(self, grid: tuple[float, ...]) -> Scheme:
        return ProjectedGrid(TABLEAUX[self.solver], grid, self.project)
