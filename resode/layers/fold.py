"""Batch norms folded into the layers before them.

In evaluation a batch norm is y ↦ a·y + c, with a = γ/√(σ² + ε) and c = β − a·μ for each channel. After a linear map
y = W x + b it is part of it: W ← a·W (for each output channel), b ← a·b + c; a time channel's weights become a·W_t.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion, parametrize

from resode.layers.conv import Conv2d, Linear
from resode.layers.norm import BatchNorm

LINEAR_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FORWARDS = {
    kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2d, Linear, _BatchNorm, BatchNorm)
}


class Folded(nn.Identity):
    """Where a batch norm was: the layer before it does its work."""


def is_known(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear map or a batch norm and nothing besides: what it gives is a new tensor.

    A class that inherits from these may do more (timm has batch norms with an activation).
    """
    return type(layer).forward in _FORWARDS


def foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm``, applied to the output of ``layer``, can be folded into it.

    Not so: statistics indexed by several t or taken from each batch; parameters that vary with t or are made of others
    (parametrizations); and what hooks look at, which would see something else.
    """
    if not isinstance(layer, LINEAR_MAPS) or not isinstance(norm, _BatchNorm):
        return False
    if not all(is_known(module) and not is_hooked(module) for module in (layer, norm)):
        return False
    if parametrize.is_parametrized(layer) or parametrize.is_parametrized(norm):
        return False
    held = (norm.running_mean, norm.running_var, norm.weight, norm.bias, layer.bias)
    return (
        norm.running_mean is not None
        and not varies(layer)
        and len(layer.weight) == norm.num_features
        # Of statistics and parameters at several t there is an axis more.
        and all(tensor is None or tensor.shape == (norm.num_features,) for tensor in held)
    )


def varies(layer: nn.Module) -> bool:
    """Whether the weight of a linear map stands for several, of which one is used at a time: it has an axis more."""
    return layer.weight.ndim > 2 + len(getattr(layer, "kernel_size", ()))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks look at what ``module`` is given or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def fold(layer: nn.Module, norm: _BatchNorm) -> None:
    """Let ``layer`` compute what ``norm`` makes of its output in evaluation, and ``norm`` become :class:`Folded`.

    Both are changed in place, so that whoever holds them holds the folded ones; the layer's parameters are new ones, so
    that another layer which shared them keeps its own. The products are taken in float64 and rounded once.
    """
    weight = layer.weight
    if isinstance(layer, Conv2d | Linear):  # a standardized weight cannot be scaled, but be held as it is used
        weight, layer.dropconnect = layer.effective_weight(), 0.0
        if isinstance(layer, Conv2d):
            layer.standardized, layer.gain = False, None
        if layer.time_weight is not None:
            layer.time_weight = _rounded(_fused(layer.time_weight, None, norm)[0], layer.time_weight)
    weight, bias = _fused(weight, layer.bias, norm)
    layer.weight, layer.bias = _rounded(weight, layer.weight), _rounded(bias, layer.weight)
    norm.__class__ = Folded
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, None)


def _fused(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """a·weight and a·bias + c, in float64 (on a CPU: not every device has it)."""
    held = (weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wide = [None if tensor is None else tensor.to("cpu", torch.float64) for tensor in held]
    weight, bias, mean, variance, gamma, beta = wide
    return fusion.fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gamma, beta)


def _rounded(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like), like.requires_grad)
