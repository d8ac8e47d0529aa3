"""The residual additions in the blocks of other packages.

A class of blocks is known by its full name, such as ``torchvision.models.resnet.BasicBlock``, so that no package needs
to be imported to know its models. For each class a table says which additions are made in it, one after the other:
h ↦ post(shortcut(h) + branch(h)). Its functions look the layers up in the block when they are called, and call them as
they are: in training mode, too, a step computes what the block would.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resode.dynamics.parts import unreadable
from resode.dynamics.step import Map, Shape, Step, identity

T = TypeVar("T")


@dataclass(frozen=True)
class Of:
    """A branch (t, h) ↦ function(module, h)."""

    module: nn.Module
    function: Callable[[Any, Tensor], Tensor]

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.function(self.module, h)


@dataclass(frozen=True)
class Activation:
    """An activation that does not overwrite what it is given, even if its module would: the sum may be needed again."""

    module: nn.Module

    def __call__(self, h: Tensor) -> Tensor:
        if type(self.module) is nn.ReLU:
            return torch.relu(h)
        return self.module(h.clone() if getattr(self.module, "inplace", False) else h)


@dataclass(frozen=True)
class Addition:
    """One addition in a class of blocks.

    Args:
        branch: from the block and the state before the addition to what is added.
        shortcut: from the block to the way round the branch.
        post: name of the activation that follows, in the block.
        word: what to call the addition where a block makes several.
    """

    branch: Callable[[Any, Tensor], Tensor]
    shortcut: Callable[[Any], Map] = lambda block: identity
    post: str | None = None
    word: str = ""

    def step(self, block: nn.Module, stage: int, label: str) -> Step:
        """The addition in this ``block``."""
        return Step(
            kind="residual",
            branch=Of(block, self.branch),
            shortcut=self.shortcut(block),
            post=identity if self.post is None else Activation(getattr(block, self.post)),
            stage=stage,
            label=f"{label} {self.word}".rstrip(),
        )


class Block(NamedTuple):
    """A block of a model, and where it stands."""

    label: str
    stage: int
    module: nn.Module


Additions = Mapping[str, tuple[Addition, ...]]
"""What is known of classes of blocks, by their full names."""


def read_blocks(model: nn.Module, parts: Iterable[Block | Step], known: Additions) -> list[Step]:
    """The additions of the blocks among ``parts``, as steps; the steps among them as they are.

    A class that inherits from a known one may compute something else: it is not known by that.

    Raises:
        InvalidInput: with every block whose class is not known.
    """
    parts = list(parts)
    require_known(model, [(part.label, part.module) for part in parts if isinstance(part, Block)], known)
    steps: list[Step] = []
    for part in parts:
        if isinstance(part, Block):
            additions = known[full_name(type(part.module))]
            steps += [addition.step(part.module, part.stage, part.label) for addition in additions]
        else:
            steps.append(part)
    return steps


def require_known(model: nn.Module, parts: Iterable[tuple[str, nn.Module]], known: Iterable[str]) -> None:
    """Refuse a model some of whose ``parts``, (label, module), are of none of the ``known`` classes.

    Raises:
        InvalidInput: with the parts in question.
    """
    known, most = set(known), 6
    strange = [f"{label} ({full_name(type(part))})" for label, part in parts if full_name(type(part)) not in known]
    if strange:
        said = ", ".join(strange[:most] + ["…"] * (len(strange) > most))
        raise unreadable(model, f"what is computed in {said} is not known")


def known_class(model: nn.Module, known: Mapping[str, T], methods: tuple[str, ...] = ()) -> T | None:
    """What is ``known`` of the model's class, or of the one that it inherits from; None if nothing.

    Args:
        methods: which a class that inherits must have left as they were, together with ``forward``.

    Raises:
        InvalidInput: for a class that inherits from a known one and changes one of these methods.
    """
    base = next((kind for kind in type(model).__mro__ if full_name(kind) in known), None)
    if base is None:
        return None
    for method in ("forward", *methods):
        if getattr(type(model), method, None) is not getattr(base, method, None):
            raise unreadable(model, f"it is a {full_name(base)} with a method {method!r} of its own")
    return known[full_name(base)]


def full_name(kind: type) -> str:
    """Such as ``torchvision.models.resnet.ResNet``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def transition(label: str, stage: int, module: nn.Module) -> Step:
    """``module`` as a transition."""
    return Step(kind="transition", branch=Of(module, _call), stage=stage, label=label)


def plain(label: str, stage: int, module: nn.Module) -> Step:
    """``module`` as a plain step."""
    return Step(kind="plain", branch=Of(module, _call), stage=stage, label=label)


def _call(module: nn.Module, h: Tensor) -> Tensor:
    return module(h)


def chain(h: Tensor, *layers: Callable[[Tensor], Tensor] | None) -> Tensor:
    """``h`` through the ``layers`` in turn; None does nothing."""
    for layer in layers:
        if layer is not None:
            h = layer(h)
    return h


def downsampling(block: Any) -> Map:
    """The shortcut of a block that has a module ``downsample``, or None for the identity."""
    return identity if block.downsample is None else block.downsample


def numbered(path: str, stage: int, modules: Iterable[nn.Module]) -> Iterator[Block]:
    """The blocks of a stage, as path.0, path.1, …"""
    for i, module in enumerate(modules):
        yield Block(f"{path}.{i}", stage, module)


def resnet_blocks(model: Any) -> Iterator[Block]:
    """The blocks of a ResNet's ``layer1`` … ``layer4``."""
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        yield from numbered(f"layer{i + 1}", i, stage)


def image_shape(model: nn.Module, height: int = 64, width: int = 64) -> Shape:
    """(C, height, width), with as many channels as the model's first convolution takes."""
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return (first.in_channels, height, width)
