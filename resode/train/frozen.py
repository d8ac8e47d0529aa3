"""Frozen batch norm: from some epoch on, training normalizes as evaluation does.

While the weights still move, a batch is normalized by its own moments, which evaluation does not know. Once they are
nearly settled, the running statistics can take their place in training, too: training and evaluation are then one
function, the gradient does not pass through the moments, and small batches do no harm ("FrozenBN" in Wu & Johnson 2021,
arXiv 2105.07576). γ and β are trained on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from resode.errors import InvalidInput
from resode.layers.norm import BatchNorm


def freeze(model: nn.Module) -> int:
    """Let every batch norm in ``model`` keep its running statistics, and normalize by them whatever its mode.

    It holds through ``model.train()`` and in deep copies, outside solves and in them, until :func:`unfreeze`. It is no
    part of a ``state_dict``. Batch norms of others' (torch's, timm's) are put into evaluation mode before each call;
    torch.compile's graphs of before would not do so, and are made anew.

    Returns:
        How many batch norms there are.

    Raises:
        InvalidInput: for a batch norm without running statistics; nothing is frozen then.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        if layer.running_mean is None:
            raise InvalidInput(
                f"{name or 'the model'} is a batch norm without running statistics (track_running_stats=False): there "
                "is nothing to freeze it at"
            )
    others = [layer for _, layer in layers if not isinstance(layer, BatchNorm) and not is_frozen(layer)]
    for _, layer in layers:
        if isinstance(layer, BatchNorm):
            layer.frozen = True
    for layer in others:
        layer.register_forward_pre_hook(_evaluate)
    _forget_graphs(others)
    return len(layers)


def unfreeze(model: nn.Module) -> int:
    """Undo :func:`freeze`: batch norms are in the mode of the model again, and gather statistics in training.

    Returns:
        How many batch norms were frozen.
    """
    layers = [layer for layer in model.modules() if is_frozen(layer)]
    for layer in layers:
        if isinstance(layer, BatchNorm):
            layer.frozen = False
        else:
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _evaluate]:
                del layer._forward_pre_hooks[key]
            layer.train(model.training)
    _forget_graphs([layer for layer in layers if not isinstance(layer, BatchNorm)])
    return len(layers)


def _forget_graphs(hooked: Sequence[nn.Module]) -> None:
    """Let torch.compile make its graphs anew, if any layer was ``hooked`` or unhooked: they do not look for hooks."""
    if hooked and "torch._dynamo" in sys.modules:  # without it nothing was compiled, and it takes seconds to load
        torch.compiler.reset()


def is_frozen(layer: nn.Module) -> bool:
    """Whether ``layer`` is a batch norm that :func:`freeze` has frozen."""
    if isinstance(layer, BatchNorm):
        return layer.frozen
    return isinstance(layer, _BatchNorm) and _evaluate in layer._forward_pre_hooks.values()


def _evaluate(layer: nn.Module, inputs: Any) -> None:
    # Before each call, since model.train() puts every layer into training mode.
    layer.training = False


@dataclass(frozen=True)
class FreezeNorm:
    """A callback of ``fit`` that freezes the batch norms of the model once so many epochs are done.

    Args:
        after: number of epochs, from 0 (frozen from the start: at the statistics the model comes with).

    Raises:
        InvalidInput: for a number that is not whole, or below 0.
    """

    after: int

    def __post_init__(self) -> None:
        if not isinstance(self.after, int) or isinstance(self.after, bool) or self.after < 0:
            raise InvalidInput(f"freeze batch norm after {self.after!r} epochs: a whole number from 0 on is expected")

    def __call__(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> bool:
        """Freeze if it is time, before ``epoch`` (from 0). The structure stays: the answer is always False."""
        if epoch >= self.after:
            freeze(model)
        return False

    def replay(self, model: nn.Module, epochs: int) -> None:
        """Freeze a net that was just built, if it was frozen at the end of so many ``epochs``."""
        if epochs > self.after:
            freeze(model)
