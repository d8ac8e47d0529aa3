"""Reading timm's networks."""

from torch import nn

from resode.dynamics.parts import Reader


def reader(model: nn.Module) -> Reader | None:
    """What reads ``model``, if it is one of timm's networks that can be read."""
    return None
