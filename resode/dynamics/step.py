"""One step in depth: h ↦ post(shortcut(h) + scale·branch(t, h))."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from resode.blocks.residual import add_branch
from resode.errors import InvalidInput
from resode.layers.context import Field, evaluate

Map = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]


def identity(h: Tensor) -> Tensor:
    """h itself."""
    return h


@dataclass(frozen=True)
class Fresh:
    """A branch whose output is a new tensor that nothing else uses: the sum may be written into it."""

    branch: Field

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.branch(t, h)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One application in depth.

    Args:
        kind: "residual"; "plain" (a layer without a shortcut: the whole map is its branch); "transition" (changes
            resolution and is neither a choice of path nor deleted, such as a pooling).
        branch: f, called as ``branch(t, h)``; None for a step that was deleted. Into what a :class:`Fresh` one gives,
            the sum is written.
        shortcut, post, scale: as in a residual block; of no meaning for the other kinds.
        stage: index of the stage the step stands in, from 0.
        t: the time at which the branch is evaluated; of a solver's step, the time at its start.
        end: of a solver's step, the time at its end; None for a block.
        label: what to call the step in tables and figures.
        shapes: shape of one sample's state before and after the step, where it is known.
    """

    kind: Literal["residual", "plain", "transition"]
    branch: Field | None
    shortcut: Map = identity
    post: Map = identity
    scale: float | Tensor = 1.0
    stage: int = 0
    t: float = 0.0
    end: float | None = None
    label: str = ""
    shapes: tuple[Shape, Shape] | None = None

    @property
    def is_deleted(self) -> bool:
        return self.branch is None

    @property
    def has_choice(self) -> bool:
        """Whether a path may go round the branch or through it."""
        return self.kind == "residual" and self.branch is not None

    @property
    def is_counted(self) -> bool:
        """Whether every path goes through the step, and is one longer for it."""
        return self.kind == "plain" and self.branch is not None

    def __call__(self, h: Tensor) -> Tensor:
        """The state after the step."""
        if self.branch is None:
            return self.post(self.shortcut(h)) if self.kind == "residual" else h
        if self.kind != "residual":
            return self.branch(self.t, h)
        total = self.sum(h)
        # The sum is a new tensor, unlike what ``post`` is given in a deleted step. On a CPU a large new tensor costs
        # page faults.
        return total.relu_() if self.post is torch.relu else self.post(total)

    def sum(self, h: Tensor) -> Tensor:
        """Of a residual step: shortcut(h) + scale·branch(t, h), before what follows the addition."""
        shortcut, branch = self.shortcut(h), evaluate(self.branch, self.t, h)
        same = (shortcut.shape, shortcut.dtype) == (branch.shape, branch.dtype)
        if isinstance(self.branch, Fresh) and same and not isinstance(self.scale, Tensor):
            return (branch if self.scale == 1.0 else branch.mul_(self.scale)).add_(shortcut)
        return add_branch(shortcut, branch, self.scale)

    def deleted(self) -> Self:
        """The step without its branch: h ↦ post(shortcut(h)); for a plain step, h ↦ h.

        Raises:
            InvalidInput: for a transition, or a plain step known to change the shape.
        """
        if why := self.not_deletable:
            raise InvalidInput(f"step {self.label!r} {why}: it cannot be deleted")
        return replace(self, branch=None)

    @property
    def not_deletable(self) -> str | None:
        """Why the step cannot be deleted, as far as is known; None if it can."""
        if self.kind == "transition":
            return "is a transition between resolutions"
        if self.kind == "plain" and self.shapes is not None and self.shapes[0] != self.shapes[1]:
            return f"is a plain layer that turns a state of shape {self.shapes[0]} into {self.shapes[1]}"
        return None
