"""The order in memory of images (B, C, H, W), where torch's own kernels on a CPU heed it badly."""

import torch
from torch import Tensor, nn


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` are images that lie in memory as (B, H, W, C), and not as (B, C, H, W), too."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def sum_over_batch(x: Tensor) -> Tensor:
    """Σ_b x[b], of shape (1, …). On a CPU torch reduces channels-last images far more slowly than their rows."""
    if not is_channels_last(x):
        return x.sum(0, keepdim=True)
    rows = x.permute(0, 2, 3, 1)
    return rows.flatten(1).sum(0).view(1, *rows.shape[1:]).permute(0, 3, 1, 2)


def gradient_alike(x: Tensor) -> Tensor:
    """``x``, a result of its own, whose gradient will lie in memory as it does, whatever it is made of.

    A mean over pixels gives its input a gradient in the other order; sums with it go on in that order, and every
    convolution and norm on the way back reorders what it is given.
    """
    if is_channels_last(x) and x.requires_grad and not torch._C._are_functorch_transforms_active():
        x.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
    return x


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) that lie channels-last in memory, by their strides, too, where C = 1 leaves it open."""
    if x.stride(1) == 1:
        return x
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def lay_channels_last(model: nn.Module) -> None:
    """Lay the weights of the convolutions of ``model`` channels-last in memory, in place; their values stay.

    ``model.to(memory_format=torch.channels_last)`` refuses weights of five dimensions, as those have that vary with t.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.ndim == 4:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
