"""Convolution and linear layers with what a branch may need: time, standardized weights, DropConnect.

**Time.** A layer that sees t as one more input channel computes conv([t·1, h]) = conv(h) + t·K with
K = conv(1; W_t), the convolution of a constant image of ones (borders included, where the padding shows). K depends
on the weights and the image size alone, so it is computed once in a solve and nothing is ever concatenated.

**Standardized weights** (Qiao et al. 2019, arXiv 1903.10520, in the scaling of Brock et al. 2021, arXiv 2101.08692,
eq. 1): Ŵ = (W − μ)/√(N σ² + ε) over the N = fan-in weights of each output channel, so that a white input of
variance 1 gives an output of variance 1. A norm that follows removes the factor 1/√N.

**Scaled standardized weights** are g·γ·Ŵ, for nets without norms (Brock et al. 2021, arXiv 2101.08692, section 4; with
the gains g: arXiv 2102.06171): g is a learned number for each output channel, 1 at first, and γ = 1/√Var φ(z) with
z ~ N(0, 1) is the gain of the activation φ that the input comes from. The mean that φ leaves is removed by Ŵ, whose sum
is 0, so that an input φ(z) gives an output of variance 1, too.

**DropConnect** (Wan et al. 2013): the weights are multiplied by a mask, drawn once a batch outside a solve, and once a
solve (or mask interval) inside one.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.polynomial.legendre import leggauss
from torch import Tensor, nn

from resode.errors import InvalidInput, positive, probability
from resode.layers import kernels
from resode.layers.context import current
from resode.layers.dropout import unit_mask
from resode.layers.layout import is_channels_last, sum_over_batch

LONGEST, NODES = 20.0, 128
"""Where a normal density is below 10⁻⁸⁷, and is cut off; and the nodes of a rule up to there, from 0."""


def standardize_weight(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """Ŵ = (W − μ)/√(N σ² + ε) over all axes but the first, for ``weight`` of shape (out, …)."""
    fan_in = weight[0].numel()
    variance, mean = torch.var_mean(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, correction=0)
    return (weight - mean) * torch.rsqrt(variance * fan_in + eps)


def time_map(
    weight: Tensor, size: tuple[int, int], stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """K = conv(1; W_t): what a time channel of t = 1 adds to a convolution's output.

    Args:
        weight: W_t, of shape (out, 1, k, k).
        size: (H, W) of the input.

    Returns:
        K of shape (1, out, H', W').
    """
    ones = torch.ones(1, 1, *size, dtype=weight.dtype, device=weight.device)
    return F.conv2d(ones, weight, stride=stride, padding=padding)


def add_time(out: Tensor, t: float | Tensor, K: Tensor) -> Tensor:
    """out + t·K, for ``out`` just made by a linear map: it is overwritten where that is possible."""
    K = K.to(out.dtype)
    if isinstance(t, Tensor):
        wide = torch.promote_types(out.dtype, torch.float32)  # a time rounded to half precision would be another
        added = t.to(wide) * K.to(wide)
        if kernels.can_spread(out, added):
            added = kernels.spread(added, len(out))
        return (out.to(wide) + added).to(out.dtype)
    # A batched K does not fit into an ``out`` without the batch; and a graph finds out by itself what to overwrite.
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return torch.add(out, K, alpha=t)
    return _AddTime.apply(out, K, t)


class _AddTime(torch.autograd.Function):
    """out + t·K in the place of ``out``; the gradient of K sums over the batch in the order of memory."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, K: Tensor, t: float) -> Tensor:
        ctx.mark_dirty(out)
        ctx.t = t
        return out.add_(K, alpha=t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return g, ctx.t * sum_over_batch(g) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, out: Tensor, K: Tensor, t: None) -> Tensor:
        return out.add_(K, alpha=ctx.t)


def activation_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """γ = 1/√Var φ(z), z ~ N(0, 1), which gives γ·φ(z) the variance 1; √2/√(1 − 1/π) for a ReLU.

    The moments are integrals over each half of the line by Gauss and Legendre's rule, exact to rounding for activations
    that are smooth but for a kink at 0, as all the usual ones are.

    Args:
        activation: φ, element by element.

    Raises:
        InvalidInput: when φ(z) does not vary, or is not finite.
    """
    half, weights = leggauss(NODES)
    z = LONGEST * torch.from_numpy((half + 1.0) / 2.0)
    density = LONGEST / 2.0 * torch.from_numpy(weights) * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    z, density = torch.cat([-z, z]), torch.cat([density, density])
    with torch.no_grad():
        value = activation(z.clone())
    mean = (density * value).sum()
    variance = float((density * (value - mean).square()).sum())
    if not 0.0 < variance < math.inf:
        raise InvalidInput(f"an activation whose variance on a standard normal input is {variance} has no gain")
    return 1.0 / math.sqrt(variance)


class _Weights(nn.Module):
    """The weights a layer uses: those it holds, standardized or dropped as its options say."""

    weight: nn.Parameter
    standardized: bool = False
    gain: nn.Parameter | None
    input_gain: float = 1.0
    dropconnect: float = 0.0
    inverted: bool = True
    mask_key: object | None = None
    """In a solve, layers with the same key have the same mask of DropConnect; None for a mask of its own."""

    def _once(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        context = current()
        return make() if context is None else context.derive(self, name, make)

    def effective_weight(self) -> Tensor:
        """The weight of this evaluation; it passes gradients to ``weight`` in every gradient mode."""
        context = current()
        training = self.training if context is None else context.is_training(self)
        if self.dropconnect == 0.0 or not training:
            plain = self._once("standardized", self._standardized) if self.standardized else self.weight
            return plain if self.inverted else plain * (1.0 - self.dropconnect)
        if context is None:
            return self._dropped(unit_mask(self.weight, self.dropconnect))
        key = self if self.mask_key is None else self.mask_key
        return self._dropped(context.mask(key, partial(unit_mask, p=self.dropconnect), self.weight.detach()))

    def _standardized(self) -> Tensor:
        weight = standardize_weight(self.weight)
        if self.gain is None:
            return weight
        return weight * (self.input_gain * self.gain).view(-1, *[1] * (weight.ndim - 1))

    def _dropped(self, mask: Tensor) -> Tensor:
        whole = self._once("standardized", self._standardized) if self.standardized else self.weight
        return whole * (mask / (1.0 - self.dropconnect) if self.inverted else mask)


class Conv2d(nn.Conv2d, _Weights):
    """Convolution with "same" padding (k // 2), and optionally time, standardized weights and DropConnect.

    Args:
        time: take ``t`` as one more input channel, by the map t·K.
        standardized: use Ŵ in place of W.
        scaled: use g·γ·Ŵ, with a learned ``gain`` g for each output channel.
        input_gain: γ, that of the activation which the input comes from (:func:`activation_gain`), for scaled weights.
        dropconnect: probability with which each weight is dropped in training, in [0, 1).
        inverted: the form of DropConnect, as in ``layers.dropout``.

    Raises:
        InvalidInput: for ``dropconnect`` outside [0, 1), a gain that is no number above 0, or standardized filters of
            one weight: less its mean it is 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = True,
        time: bool = False,
        standardized: bool = False,
        scaled: bool = False,
        input_gain: float = 1.0,
        dropconnect: float = 0.0,
        inverted: bool = True,
    ) -> None:
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias
        )
        self.standardized = standardized or scaled
        if self.standardized and self.weight[0].numel() < 2:
            raise InvalidInput(
                f"standardized weights of a {kernel_size}×{kernel_size} convolution from {in_channels} channels in "
                f"{groups} groups: each filter has one weight, which is 0 less its mean; use more channels, a larger "
                "kernel, or standard weights"
            )
        self.gain = None
        if scaled:
            self.gain = nn.Parameter(torch.ones(out_channels))
            self.input_gain = positive(input_gain, "gain of the input's activation")
        self.dropconnect = probability(dropconnect, "dropconnect p")
        self.inverted = inverted
        self.time_weight: nn.Parameter | None = None
        if time:
            self.time_weight = nn.Parameter(torch.empty(out_channels, 1, kernel_size, kernel_size))
            bound = 1.0 / math.sqrt(self.weight[0].numel() + kernel_size**2)
            nn.init.uniform_(self.time_weight, -bound, bound)

    def forward(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        out = self._conv_forward(x, self.effective_weight(), self.bias)
        if self.time_weight is None:
            return out
        size = (x.shape[-2], x.shape[-1])
        layout = torch.channels_last if is_channels_last(out) else torch.contiguous_format
        # The layout is no part of the name: while a graph is traced a norm's output may seem to lie in the other one.
        return add_time(out, t, self._once(size, partial(self._time_map, size, layout)))

    def _time_map(self, size: tuple[int, int], layout: torch.memory_format) -> Tensor:
        K = time_map(self.time_weight, size, self.stride, self.padding)
        return K.contiguous(memory_format=layout)

    def extra_repr(self) -> str:
        return super().extra_repr() + _options(self)


class Linear(nn.Linear, _Weights):
    """W h + b, and optionally time (+ t·w, a column of weights more) and DropConnect."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        time: bool = False,
        dropconnect: float = 0.0,
        inverted: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gain = None
        self.dropconnect = probability(dropconnect, "dropconnect p")
        self.inverted = inverted
        self.time_weight: nn.Parameter | None = None
        if time:
            bound = 1.0 / math.sqrt(in_features + 1)
            self.time_weight = nn.Parameter(torch.empty(out_features, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        out = F.linear(x, self.effective_weight(), self.bias)
        return out if self.time_weight is None else add_time(out, t, self.time_weight.T)

    def extra_repr(self) -> str:
        return super().extra_repr() + _options(self)


def _options(layer: Conv2d | Linear) -> str:
    said = ", time=True" if layer.time_weight is not None else ""
    said += ", standardized=True" if layer.standardized else ""
    said += f", scaled=True, input_gain={layer.input_gain:.4g}" if layer.gain is not None else ""
    return said + (f", dropconnect={layer.dropconnect}" if layer.dropconnect else "")
