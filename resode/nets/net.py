"""The one scheme of every net: stem, stages, head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """A layer without a shortcut: convolution (or linear) – norm – activation – dropout."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*without_identities(layers))

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)


class Net(nn.Module):
    """head(stages(stem(x))): logits of shape (B, classes) from images (B, C, H, W) or points (B, C).

    Args:
        stem, head: modules.
        stages: each a sequence of residual blocks, plain layers, ODE blocks and transitions (poolings).

    ``input_shape`` is that of one input, (C, H, W) or (C,), where it is known (``nets.build`` knows it).
    """

    input_shape: tuple[int, ...] | None = None

    def __init__(self, stem: nn.Module, stages: list[nn.Sequential], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for stage in self.stages:
            h = stage(h)
        return self.head(h)


def without_identities(layers: tuple[nn.Module, ...] | list[nn.Module]) -> list[nn.Module]:
    """``layers`` without those that do nothing."""
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]


def parameter_count(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode and no gradients; the mode of each of its modules is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
