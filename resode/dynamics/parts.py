"""What a reader finds in a model: stem, steps and head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from resode.dynamics.step import Map, Shape, Step
from resode.errors import InvalidInput


@dataclass(frozen=True)
class Parts:
    """A model as head ∘ steps ∘ stem.

    Args:
        shape: of one input, (C, H, W) or (C,), where the reader knows one that fits: the view is then compared with its
            model as soon as it is made.
    """

    stem: Map
    steps: Sequence[Step]
    head: Map
    shape: Shape | None = None


Reader = Callable[[nn.Module], Parts]


def unreadable(model: nn.Module, why: str) -> InvalidInput:
    """The error for a model that no reader knows."""
    return InvalidInput(
        f"cannot read a {type(model).__name__} as steps: {why}; describe it by hand: dynamics(model, read=f), where "
        "f(model) returns resode.Parts(stem, steps, head)"
    )


def children_of(model: nn.Module, most: int = 8) -> str:
    """The modules of ``model``, by name and class, for an error."""
    found = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    return ", ".join(found[:most] + ["…"] * (len(found) > most)) or "no modules"
