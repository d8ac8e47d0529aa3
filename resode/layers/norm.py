"""Normalizations: y = γ·(x − μ)/√(σ² + ε) + β, which differ in the set over which μ and σ² are taken.

========== ========================================== =====================================================
name       μ and σ² over, for x of shape (B, C, H, W) source
========== ========================================== =====================================================
batch      B, H, W for each channel                   Ioffe & Szegedy 2015, arXiv 1502.03167
layer      C, H, W for each image                     Ba, Kiros & Hinton 2016, arXiv 1607.06450
pixel      C for each image and pixel                 Liu et al. 2022 (ConvNeXt), arXiv 2201.03545
instance   H, W for each image and channel            Ulyanov et al. 2016, arXiv 1607.08022
group      H, W and a group of channels for each      Wu & He 2018, arXiv 1803.08494
           image
none       no normalization
========== ========================================== =====================================================

States of shape (B, C) are taken as images of one pixel: batch over B; layer and pixel both over C; group over a
group of channels; instance has nothing to average over and is refused. So is any other set of one value: its σ² is 0,
and what is left of x is β.

The statistics are taken in float32 (float64 where x is), and what is returned has the type of x: under autocast a norm
of half precision costs one rounding of its output.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.errors import InvalidInput, choose
from resode.layers.context import Moments, current, outside_graphs
from resode.layers.layout import is_channels_last
from resode.layers.synchronized import Processes, by_channel, common_moments

NORMS = ("batch", "layer", "pixel", "instance", "group", "none")
AFFINES = ("channel", "elementwise")


def _check_several(values: int, over: str, x: Tensor) -> None:
    """Check that there are several ``values`` to average over: of one the variance is 0, and β all that is left."""
    if values < 2:
        raise InvalidInput(
            f"{over}, and a state of shape {tuple(x.shape)} has one value there: use more channels, larger images, "
            "fewer stages, or another norm"
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over all axes but the first.

    Args:
        x: (B, C, H, W) or (B, C).
        weight, bias: (C,) for one γ and β a channel, or the shape of one image, ``x.shape[1:]``.

    Raises:
        InvalidInput: when an image has one value.
    """
    if weight.ndim == 1:
        return group_norm(x, 1, weight, bias, eps)
    _check_several(math.prod(x.shape[1:]), "layer norm averages over the values of an image", x)
    return F.layer_norm(x, x.shape[1:], weight, bias, eps).to(x.dtype)  # autocast on CUDA leaves it in float32


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Norm over the pixels of each of ``groups`` groups of channels: ``x`` (B, C, H, W) or (B, C); the others (C,).

    In half precision a CPU normalizes channels-last images in the other order of memory: torch's kernel for them takes
    many times as long as for contiguous ones, and the two reorderings far less.

    Raises:
        InvalidInput: when a group has one value.
    """
    over = "layer norm averages over the values of an image" if groups == 1 else "group norm averages over a group"
    _check_several(math.prod(x.shape[1:]) // groups, over, x)
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and is_channels_last(x):
        out = F.group_norm(x.contiguous(), groups, weight, bias, eps)
        return out.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, groups, weight, bias, eps).to(x.dtype)


def pixel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the channels of each pixel: ``x`` (B, C, H, W) or (B, C); ``weight``, ``bias`` (C,).

    Raises:
        InvalidInput: when there is one channel.
    """
    _check_several(x.shape[1], "pixel norm averages over the channels of a pixel", x)
    return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, eps).movedim(-1, 1).to(x.dtype)


class LayerNorm(nn.Module):
    """:func:`layer_norm`, with one γ and β a channel, or (``shape`` given) one for each element of an image.

    Args:
        channels: C.
        size: (H, W) of the images, for the elementwise affine map with its 2·H·W·C parameters.

    Raises:
        InvalidInput: in the forward pass, when an image has not the size the affine map was made for, or one value.
    """

    def __init__(self, channels: int, size: tuple[int, int] | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (channels,) if size is None else (channels, *size)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim > 1 and x.shape[1:] != self.weight.shape:
            raise InvalidInput(
                f"layer norm with an elementwise affine map of {tuple(self.weight.shape)} was given an image of "
                f"{tuple(x.shape[1:])}: build the net for that image size, or use affine='channel'"
            )
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class PixelNorm(nn.Module):
    """:func:`pixel_norm` with one γ and β a channel.

    Raises:
        InvalidInput: in the forward pass, when there is one channel.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class InstanceNorm(nn.Module):
    """Normalization over the pixels of each channel of each image, with one γ and β a channel.

    Raises:
        InvalidInput: in the forward pass, when there is but one pixel: its variance is 0, and the input is lost.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        _check_several(math.prod(x.shape[2:]), "instance norm averages over the pixels of a channel", x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """:func:`group_norm`, as torch's module.

    Raises:
        InvalidInput: in the forward pass, when a group has one value.
    """

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm(_BatchNorm):
    """Batch norm whose running statistics may be indexed by time, for (B, C) and (B, C, H, W).

    With one knot (the default) it is torch's batch norm. With K knots t_1 < … < t_K (:meth:`set_knots`) the running
    mean and variance have shape (K, C) and are functions of t, piecewise linear between the knots and constant
    beyond them. In training a batch is normalized by its own moments at whatever t it is met. At the end of a solve
    the moments met on accepted steps are scattered to the knots by hat weights φ_k(t) and averaged,
    m_k = Σ_i φ_k(t_i) m(t_i) / Σ_i φ_k(t_i); a knot that no evaluation came near takes its neighbours', by linear
    interpolation; then every knot makes one momentum update. A recomputation, a rejected step or an adjoint solve
    never updates. Between the knots the field has kinks in t: a grid without them as points loses order (rk4 falls to
    3). It is a ``_BatchNorm``, so torch's tools (``update_bn``, parameter groups) see it.

    **Synchronized**, it takes the moments of a batch over all processes of a group of ``torch.distributed``, weighted
    by the numbers of values, in a solve as outside one: outputs, gradients and running statistics are those of one
    process with the whole batch (:func:`resode.blocks.synchronize` makes a model so). In evaluation nothing is
    exchanged.

    **Frozen** (see ``train.frozen``), it normalizes by its running statistics in training, too, and leaves them as they
    are; γ and β are trained on.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's.
        synchronized: take the moments over the processes of ``group``.
        group: a group of ``torch.distributed``; all processes if None.

    Raises:
        InvalidInput: when it has several knots and is called with no time known, which is outside a
            ``ResidualBlock``, an ``ODEBlock`` and ``resode.evaluate``; in training, for a batch of one value a channel,
            and when it is synchronized and ``torch.distributed`` is not initialized.
    """

    knots: tuple[float, ...] = (0.0,)
    processes: Processes | None = None
    """Those that the moments are taken over, if it is synchronized."""
    frozen: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        synchronized: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if synchronized:
            self.processes = Processes(group)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise InvalidInput(f"batch norm was given a state of shape {tuple(input.shape)}: (B, C, …) is expected")

    @property
    def indexed_by_time(self) -> bool:
        """Whether the running statistics depend on t."""
        return len(self.knots) > 1

    def set_knots(self, times: Sequence[float]) -> None:
        """Index the running statistics by ``times``, increasing; those held so far are interpolated.

        Raises:
            InvalidInput: when the times do not increase, or there are none.
        """
        knots = tuple(float(t) for t in times)
        if not knots or not all(left < right for left, right in pairwise(knots)):
            raise InvalidInput(f"knots {knots} of batch norm: at least one is needed, and they must increase")
        if self.track_running_stats:
            for name in ("running_mean", "running_var"):
                held = torch.stack([self._at(getattr(self, name), t) for t in knots])
                setattr(self, name, held[0] if len(knots) == 1 else held)
            # How many batches each knot has met, as for the mean of all batches (momentum None): as many as each of the
            # knots that it is interpolated from.
            met = self.num_batches_tracked.view(-1)
            batches = torch.stack([met[[i for i, _ in hat_weights(t, self.knots)]].amin() for t in knots])
            self.num_batches_tracked = batches[0] if len(knots) == 1 else batches
        self.knots = knots

    @outside_graphs
    def statistics(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance at time ``t``, each of shape (C,)."""
        return self._at(self.running_mean, t), self._at(self.running_var, t)

    def _at(self, held: Tensor, t: float | Tensor) -> Tensor:
        if len(self.knots) == 1:
            return held
        if isinstance(t, Tensor):  # by tensor operations alone: its value may not be known (a traced step)
            knots = torch.tensor(self.knots, dtype=t.dtype, device=t.device)
            right = torch.bucketize(t, knots).clamp(1, len(self.knots) - 1)
            share = ((t - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0.0, 1.0)
            return torch.lerp(held[right - 1], held[right], share.to(held.dtype))
        (i, w), *rest = hat_weights(t, self.knots)
        return held[i] if not rest else torch.lerp(held[i], held[rest[0][0]], 1.0 - w)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        context = current()
        alone = context is None or context.single
        if not self.track_running_stats or (alone and len(self.knots) == 1):
            return self._without_time(x)
        if context is None:
            raise InvalidInput(
                "this batch norm's running statistics are indexed by t, and no time is known here: call its branch "
                "through a ResidualBlock, an ODEBlock, or resode.evaluate(branch, t, h)"
            )
        if self.frozen or not context.is_training(self):
            mean, variance = self.statistics(context.t)
            return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        out, mean, variance = self._by_its_moments(x)
        context.record(Moments(self, context.t, mean, variance))
        return out

    def _without_time(self, x: Tensor) -> Tensor:
        """As torch's: a training pass updates the running statistics as it goes."""
        if self.frozen:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        if not (self.training and self.is_spread()):
            if self.training:
                self._check_values(x)
            return super().forward(x)
        out, mean, variance = self._by_its_moments(x)
        if self.track_running_stats:
            self.absorb([self.knots[0]], [mean], [variance], whole=True)
        return out

    def _by_its_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch normalized by its own moments, its mean, and its unbiased variance (without gradients)."""
        if self.is_spread():
            return self._by_common_moments(x)
        self._check_values(x)
        # Fresh buffers at momentum 1 receive this batch's moments, from the same kernel that normalizes.
        mean, variance = torch.zeros_like(self._any_mean), torch.zeros_like(self._any_mean)
        out = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        return out, mean, variance

    def _by_common_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = current()
        if torch.compiler.is_compiling() or (context is not None and context.inputs is not None):
            raise InvalidInput(
                "synchronized batch norm waits for other processes, which no graph of one shows: compile neither the "
                "model nor its ODE blocks, or use another norm"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance, number = common_moments(wide, self.processes)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = (wide - by_channel(mean, x)) * by_channel(scale, x)
        if self.bias is not None:
            out = out + by_channel(self.bias, x)
        unbiased = variance.detach() * (number / (number - 1).clamp(min=1))
        return out.to(x.dtype), mean.detach(), unbiased

    def is_spread(self) -> bool:
        """Whether a batch of this layer is spread over several processes."""
        return self.processes is not None and self.processes.count() > 1

    def _check_values(self, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            raise InvalidInput(
                f"batch norm in training was given one value a channel, a batch of shape {tuple(x.shape)}, whose "
                "variance is 0: use larger batches, frozen statistics, or another norm"
            )

    @property
    def _any_mean(self) -> Tensor:
        return self.running_mean if len(self.knots) == 1 else self.running_mean[0]

    @torch.no_grad()
    def absorb(self, times: list[float], means: list[Tensor], variances: list[Tensor], whole: bool) -> None:
        """Make the momentum update from all the moments (n of shape (C,)) met at ``times``.

        Args:
            whole: they are those of a whole solve, so that every knot is updated. Otherwise (a tied residual block,
                which meets its own t alone) only the knots near ``times`` are.
        """
        rows = scatter_weights(times, self.knots, whole)
        weights = torch.tensor(rows, dtype=means[0].dtype, device=means[0].device)
        met = weights.sum(1)
        self.num_batches_tracked.add_((met > 0).view_as(self.num_batches_tracked))
        momentum = 1.0 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
        share = (met * momentum).unsqueeze(1)
        with torch.autocast(weights.device.type, enabled=False):  # the statistics are not for half precision
            for held, moments in ((self.running_mean, means), (self.running_var, variances)):
                # Moments over several processes are never in half precision, as the weights and buffers may be.
                found = (weights @ torch.stack(moments)).to(held.dtype).view_as(held)
                held.lerp_(found, share.to(held.dtype).expand(-1, held.shape[-1]).view_as(held))


def index_statistics(branch: nn.Module, times: Sequence[float]) -> None:
    """Index the running statistics of every batch norm in ``branch`` by the knots ``times``."""
    for layer in branch.modules():
        if isinstance(layer, BatchNorm):
            layer.set_knots(times)


def hat_weights(t: float, knots: Sequence[float]) -> list[tuple[int, float]]:
    """The one or two knots whose hat functions do not vanish at ``t``, with their weights, which sum to 1."""
    if t <= knots[0]:
        return [(0, 1.0)]
    if t >= knots[-1]:
        return [(len(knots) - 1, 1.0)]
    right = bisect_right(knots, t)
    share = (t - knots[right - 1]) / (knots[right] - knots[right - 1])
    # A time that misses its knot by the rounding of t0 + i·dt is on it.
    if share < 1e-9:
        return [(right - 1, 1.0)]
    if share > 1.0 - 1e-9:
        return [(right, 1.0)]
    return [(right - 1, 1.0 - share), (right, share)]


def scatter_weights(times: Sequence[float], knots: Sequence[float], whole: bool = True) -> list[list[float]]:
    """Rows (one a knot) of weights over ``times`` that sum to 1: hat averages, or the visited neighbours'.

    If not ``whole``, the rows of knots that no time came near are 0 instead.
    """
    rows = [[0.0] * len(times) for _ in knots]
    for i, t in enumerate(times):
        for k, w in hat_weights(t, knots):
            rows[k][i] += w
    visited = [k for k, row in enumerate(rows) if sum(row) > 0.0]
    for k in visited:
        total = sum(rows[k])
        rows[k] = [w / total for w in rows[k]]
    if not whole:
        return rows
    seen = [knots[k] for k in visited]
    for k in set(range(len(knots))).difference(visited):
        near = [(w, rows[visited[j]]) for j, w in hat_weights(knots[k], seen)]
        rows[k] = [sum(w * row[i] for w, row in near) for i in range(len(times))]
    return rows


def group_count(channels: int, most: int = 8, least: int = 4) -> int:
    """The largest number of equal groups, at most ``most``, with at least ``least`` channels each (1 if none has).

    On vectors (B, C) a group of one channel would lose its input, and one of two would keep no more than a sign.
    """
    return next((g for g in range(most, 1, -1) if channels % g == 0 and channels // g >= least), 1)


def make_norm(name: str, channels: int, size: tuple[int, int] | None = None, affine: str = "channel") -> nn.Module:
    """The normalization ``name`` for ``channels`` channels.

    Args:
        size: (H, W) of the images; needed by the elementwise affine map of layer norm alone.
        affine: "channel" (one γ and β a channel) or, for layer norm, "elementwise" (one an element).

    Raises:
        InvalidInput: for an unknown name, or an elementwise affine map of another norm or of an unknown size.
    """
    choose(name, NORMS, "norm")
    choose(affine, AFFINES, "affine map of a norm")
    if affine == "elementwise":
        if name != "layer":
            raise InvalidInput(f"affine='elementwise' is an option of the norm 'layer', not of {name!r}")
        if size is None:
            raise InvalidInput("affine='elementwise' needs the image size: pass size=(H, W)")
        return LayerNorm(channels, size)
    if name == "group":
        return GroupNorm(group_count(channels), channels)
    makers = {
        "batch": BatchNorm, "layer": LayerNorm, "pixel": PixelNorm, "instance": InstanceNorm, "none": nn.Identity
    }  # fmt: skip
    return makers[name](channels)
