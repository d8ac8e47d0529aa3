"""What tells two modules apart besides the values of their parameters and running statistics."""

from collections.abc import Iterator

import torch
from torch import nn

from resode.blocks.residual import ResidualBlock
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout
from resode.layers.norm import BatchNorm

BY_PLACE: dict[type[nn.Module], set[str]] = {
    ResidualBlock: {"t"},
    BatchNorm: {"knots"},
    Dropout: {"p"},
    Conv2d: {"dropconnect"},
    Linear: {"dropconnect"},
}
"""Settings of our own modules that may differ from block to block of a stage: times, and the schedule of dropout."""


def difference(one: nn.Module, other: nn.Module) -> str | None:
    """What tells ``other`` from ``one``, in words; None if they are the same but for the values they have learned.

    Compared are the classes of their modules, the numbers and names that these hold as plain attributes (but for their
    modes and what is `BY_PLACE`), the shapes of parameters, and the values of buffers other than the running statistics
    of batch norms.
    """
    mine, its = dict(one.named_modules()), dict(other.named_modules())
    if mine.keys() != its.keys():
        return f"their modules are {', '.join(mine)} and {', '.join(its)}"
    for name, module in mine.items():
        if found := _differences(module, its[name]):
            return f"{name or 'they'} ({type(module).__name__}) differ in {found}"
    return None


def _differences(one: nn.Module, other: nn.Module) -> str | None:
    if type(one) is not type(other):
        return f"class: the other is a {type(other).__name__}"
    mine, its = _settings(one), _settings(other)
    for name in mine.keys() | its.keys():
        if mine.get(name) != its.get(name):
            return f"{name}: {mine.get(name)} and {its.get(name)}"
    shapes = [{name: p.shape for name, p in module.named_parameters(recurse=False)} for module in (one, other)]
    if shapes[0] != shapes[1]:
        return f"the shapes of parameters: {shapes[0]} and {shapes[1]}"
    for (name, mine), (_, its) in zip(_fixed(one), _fixed(other), strict=True):
        if not torch.equal(mine, its):
            return f"the buffer {name}, which is no parameter"
    return None


def _settings(module: nn.Module) -> dict[str, object]:
    plain = int | float | str | tuple | None
    left_out = {"training"}.union(*(names for kind, names in BY_PLACE.items() if isinstance(module, kind)))
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in left_out and isinstance(value, plain)
    }


def _fixed(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(module, BatchNorm):
        yield from module.named_buffers(recurse=False)
