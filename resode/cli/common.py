"""What several commands do alike."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from resode.blocks.ode import ode_blocks, solver_settings
from resode.errors import InvalidInput
from resode.nets.config import Architecture
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup

Folder = Annotated[Path, tyro.conf.Positional]
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class SetupFlags:
    """The settings of a training, for the commands that take them: all flags stand beside each other.

    Args:
        device: cpu, cuda, cuda:1.
    """

    device: str = "cpu"
    architecture: Annotated[Architecture, Flat] = field(default_factory=Architecture)
    stack: Annotated[Stack, Flat] = field(default_factory=Stack)
    data: Annotated[Data, Flat] = field(default_factory=Data)
    recipe: Annotated[Recipe, Flat] = field(default_factory=Recipe)

    @property
    def setup(self) -> Setup:
        """These settings."""
        return Setup(architecture=self.architecture, stack=self.stack, data=self.data, recipe=self.recipe)


def of_split(name: str, split: str) -> str:
    """The name of a result: that of the test split has no addition."""
    return name if split == "test" else f"{name}-{split}"


def solved_by(model: nn.Module, **settings: Any) -> AbstractContextManager[None]:
    """The ODE blocks of ``model`` with those ``settings`` that were given.

    Raises:
        InvalidInput: for settings that no block of the model would heed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if given and not ode_blocks(model):
        raise InvalidInput(f"{', '.join(given)} given, and this net has no ODE block")
    return solver_settings(model, **given)


def said_of(values: dict[str, float]) -> str:
    """Accuracy, loss and count as a line says them."""
    return f"accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f} on {values['count']} samples"
