"""What several commands do alike."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import nn

from resode.blocks.ode import ode_blocks, solver_settings
from resode.errors import InvalidInput
from resode.nets.config import Architecture
from resode.stack import Stack
from resode.train.presets import PRESETS
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup

Folder = Annotated[Path, tyro.conf.Positional]
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class SetupFlags:
    """The settings of a training, for the commands that take them: all flags stand beside each other.

    Args:
        device: cpu, cuda, cuda:1.
        preset: begin from the settings of a known training; other flags replace single ones of them.
    """

    device: str = "cpu"
    preset: Literal["he2016", "lecture", "fast", "strikes-back-a3", "odenet-mnist"] | None = None
    architecture: Annotated[Architecture, Flat] = field(default_factory=Architecture)
    stack: Annotated[Stack, Flat] = field(default_factory=Stack)
    data: Annotated[Data, Flat] = field(default_factory=Data)
    recipe: Annotated[Recipe, Flat] = field(default_factory=Recipe)

    @property
    def setup(self) -> Setup:
        """These settings."""
        return Setup(architecture=self.architecture, stack=self.stack, data=self.data, recipe=self.recipe)


def flags_of_preset(arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of :class:`SetupFlags` under the preset that ``arguments`` name: none without one.

    What is no preset is left for the reading of the arguments to complain about.
    """
    name = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == "--preset":
            name = following
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    if name not in PRESETS:
        return {}
    setup = PRESETS[name]()
    return {"preset": name, **{part.name: getattr(setup, part.name) for part in fields(setup)}}


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
