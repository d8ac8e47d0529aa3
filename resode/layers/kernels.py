"""Operations that a compiled graph leaves to torch's own kernels, where these are faster than those made for it.

On a CPU, Inductor sums over a batch one element at a time, across the order of memory, and takes group norm apart into
sums and elementwise operations. For channels-last images both take longer than torch's own by more than is saved by
joining them to their neighbours. A custom operation is called as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from resode.layers.layout import is_channels_last, sum_over_batch

aten = torch.ops.aten


def in_graphs(device: torch.device) -> Mapping[Any, Callable[..., Any]]:
    """What stands for which of torch's operations in a graph for ``device``. It can be differentiated once, no more."""
    return {aten.native_group_norm.default: _group_norm} if device.type == "cpu" else {}


def transformed() -> bool:
    """Whether transforms of torch.func or tangents are at work, which custom operations and graphs do not know."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def can_spread(out: Tensor, x: Tensor) -> bool:
    """Whether :func:`spread` serves: on a CPU, where ``x`` has a gradient and nothing is :func:`transformed`."""
    return out.device.type == "cpu" and x.requires_grad and not transformed()


@torch.library.custom_op("resode::spread", mutates_args=())
def spread(x: Tensor, n: int) -> Tensor:
    """``x`` (1, …) as n samples alike, all of which lie in one place; the gradient is summed over the batch."""
    return x.clone().expand(n, *x.shape[1:])


@spread.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return torch.empty_like(x).expand(n, *x.shape[1:])


spread.register_autograd(lambda ctx, g: (_sum_over_batch(g), None))


@torch.library.custom_op("resode::sum_over_batch", mutates_args=())
def _sum_over_batch(x: Tensor) -> Tensor:
    return sum_over_batch(x)


@_sum_over_batch.register_fake
def _(x: Tensor) -> Tensor:
    return _laid_alike(x)[:1].clone()


_sum_over_batch.register_autograd(
    lambda ctx, g: g.expand(ctx.batch, *g.shape[1:]),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "batch", len(inputs[0])),
)


@torch.library.custom_op("resode::group_norm", mutates_args=())
def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.native_group_norm``: y, and μ and 1/σ of each group (n, groups)."""
    return torch.native_group_norm(x, weight, bias, n, c, pixels, groups, eps)


# torch's own descriptions of the norm and its gradient say that they give contiguous tensors; they keep channels-last.
@_group_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    moments = (x if weight is None else weight).new_empty(n, groups)
    return _laid_alike(x), moments, torch.empty_like(moments)


@torch.library.custom_op("resode::group_norm_backward", mutates_args=())
def _group_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, n: int, c: int, pixels: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x, and ∂L/∂γ and ∂L/∂β (empty without γ), for ``dy`` = ∂L/∂y."""
    wanted = [True, weight is not None, weight is not None]
    dx, dweight, dbias = aten.native_group_norm_backward(dy, x, mean, scale, weight, n, c, pixels, groups, wanted)
    return dx, *(x.new_empty(0) if d is None else d for d in (dweight, dbias))


@_group_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, n: int, c: int, pixels: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    of = x.new_empty(0) if weight is None else weight
    return _laid_alike(x), torch.empty_like(of), torch.empty_like(of)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _bias, *ctx.sizes, _eps = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(x, mean, scale, weight)


def _group_norm_back(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, mean, scale, weight = ctx.saved_tensors
    dx, dweight, dbias = _group_norm_backward(dy, x, mean, scale, weight, *ctx.sizes)
    return dx, None if weight is None else dweight, None if weight is None else dbias, *(None,) * 5


_group_norm.register_autograd(_group_norm_back, setup_context=_keep_norm)


def _laid_alike(x: Tensor) -> Tensor:
    """An empty tensor like ``x``, dense, in the order of memory in which torch's kernels answer ``x``."""
    order = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=order)
