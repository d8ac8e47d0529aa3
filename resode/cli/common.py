"""What several commands do alike."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from resode.blocks.ode import ode_blocks, solver_settings
from resode.errors import InvalidInput

Folder = Annotated[Path, tyro.conf.Positional]
Flat = tyro.conf.arg(name="")


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
