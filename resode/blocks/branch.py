"""The residual branch f(t, h), in its usual kinds.

=======================  ===================================================================  =========================
kind                    layers, for C channels                                               source
=======================  ===================================================================  =========================
basic (post-activation) conv3 – norm – act – drop – conv3 – norm                             He et al. 2016, 1512.03385
preact                  norm – act – conv3 – norm – act – drop – conv3                       He et al. 2016, 1603.05027
bottleneck (post-act.)  conv1 – norm – act – conv3 – norm – act – drop – conv1 – norm        He et al. 2016, 1512.03385
convnext                depthwise conv7 – norm – conv1 – act – drop – conv1 – layer scale    Liu et al. 2022, 2201.03545
mlp                     linear – norm – act – drop – linear, for states (B, C)
=======================  ===================================================================  =========================

The width inside is C times ``expansion``: 1 for basic and preact, 1/4 for bottleneck, 4 for convnext and mlp. A
branch ends with path dropout (stochastic depth) when the stack asks for it.

Time may reach a branch in two ways: ``concat``, a constant channel of value t before every convolution, computed as
the map t·K (Chen et al. 2018 concatenate); ``film``, a scale and shift by an embedding of t after every norm. Or all of
the branch's parameters may vary with t: ``constant`` on pieces, ``linear`` between knots, or on a ``fourier`` basis
(see ``layers.basis``), so that a flow has as many parameters as the residual blocks it stands for. With ``none`` it is
the same at all times.

A batch or instance norm removes what is constant over all that it averages, so of a time channel in the convolution
before it only the borders remain (and nothing in a linear layer or a 1×1 convolution, whose weights for t then get no
gradient): with those norms ``film`` lets more of t through.
"""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

from resode.blocks.varying import Layers, drawn_knots, stack_parameters
from resode.errors import InvalidInput, choose, positive
from resode.layers.basis import BASES, Basis, knots_of
from resode.layers.conv import Conv2d, Linear
from resode.layers.modulation import FiLM, LayerScale
from resode.layers.norm import BatchNorm, InstanceNorm, LayerNorm
from resode.stack import Stack

KINDS = ("basic", "preact", "bottleneck", "convnext", "mlp")
TIMES = ("none", "concat", "film", *BASES)
POST_ACTIVATION = ("basic", "bottleneck")
"""Kinds whose residual block has an activation after the addition, outside the branch."""

EXPANSION = {"basic": 1.0, "preact": 1.0, "bottleneck": 0.25, "convnext": 4.0, "mlp": 4.0}


class Branch(nn.Module):
    """A residual branch ``f(t, h)``; ``branch(t, h)`` has the shape of ``h`` unless told otherwise.

    Args:
        channels: C of the state (B, C, H, W), or (B, C) for the kind "mlp".
        stack: normalization, activation, dropout and convolution of its layers.
        kind: "basic", "preact", "bottleneck", "convnext" or "mlp".
        time: "none", "concat" or "film", or "constant", "linear" or "fourier" for parameters that vary with t.
        knots: number K of values of each parameter that varies: pieces (constant), knots (linear) or basis functions
            (fourier), over [0, 1] or what :meth:`set_span` says. By default those of 4 pieces. Each has a draw of its
            own at first; on the fourier basis the constant function's has, and the others are 0.
        out_channels: channels of the output, C if None.
        stride: stride of the first 3×3 (or 7×7) convolution.
        expansion: width inside over ``out_channels``; the kind's own if None.
        size: (H, W) of the state, for norms with an elementwise affine map.
        depth: relative depth in the net, in [0, 1], for dropout with a linear schedule.

    Raises:
        InvalidInput: for an unknown kind or time, numbers that are not above 0, or a combination that makes no sense (a
            strided mlp, an instance norm on vectors, knots for parameters that do not vary).
    """

    def __init__(
        self,
        channels: int,
        stack: Stack | None = None,
        kind: str = "preact",
        time: str = "none",
        out_channels: int | None = None,
        stride: int = 1,
        *,
        knots: int | None = None,
        expansion: float | None = None,
        size: tuple[int, int] | None = None,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        self.stack = stack = Stack() if stack is None else stack
        self.kind = choose(kind, KINDS, "branch kind")
        self.time = choose(time, TIMES, "time conditioning")
        self.channels = channels
        self.out_channels = channels if out_channels is None else out_channels
        self.stride = stride
        if channels < 1 or self.out_channels < 1 or stride < 1:
            raise InvalidInput(
                f"a branch of {channels} to {self.out_channels} channels with stride {stride}: each must be at least 1"
            )
        if expansion is not None:
            positive(expansion, "expansion")
        if kind == "mlp" and (stride != 1 or stack.norm == "instance" or stack.conv != "standard"):
            raise InvalidInput(
                "a branch of kind 'mlp' acts on vectors (B, C): no stride, instance norm or standardized convolution"
            )
        width = max(1, round((EXPANSION[kind] if expansion is None else expansion) * self.out_channels))
        basis = make_basis(time, knots)

        def layers() -> Layers:
            parts = _Parts(stack, time == "concat", time == "film", size, stride, depth, kind in POST_ACTIVATION)
            made = getattr(parts, kind)(channels, width, self.out_channels)
            kept = [layer for layer in made if not isinstance(layer, nn.Identity)]
            _overwrite_before_relu(kept)
            return Layers(kept, basis)

        self.layers = layers()
        if basis is not None:
            others = [layers() for _ in range(drawn_knots(basis) - 1)]
            stack_parameters([self.layers, *others], basis.knots)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times at which the parameters jump or bend."""
        return () if self.layers.basis is None else self.layers.basis.breakpoints

    def set_span(self, t0: float, t1: float) -> None:
        """Let the basis of parameters that vary span [``t0``, ``t1``]; beyond it they are as at its ends."""
        self.layers.set_span(t0, t1)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        """f(t, h).

        Args:
            t: time in [0, 1], a float or a tensor of no dimension.
            h: (B, C, H, W), or (B, C) for the kind "mlp".

        Raises:
            InvalidInput: when ``h`` has not the number of axes, or of channels, the branch was made for.
        """
        # torch's layers would take (C, H, W) for one image, and the last axis of images for vectors.
        if h.ndim != (2 if self.kind == "mlp" else 4) or h.shape[1] != self.channels:
            expected = f"(B, {self.channels})" if self.kind == "mlp" else f"(B, {self.channels}, H, W)"
            raise InvalidInput(
                f"a branch of {self.channels} channels was given a state of shape {tuple(h.shape)}: {expected} is "
                "expected"
            )
        return self.layers.at(t, h)

    def extra_repr(self) -> str:
        basis = self.layers.basis
        return f"kind={self.kind!r}, time={self.time!r}" + ("" if basis is None else f", knots={basis.knots}")


_FRESH = (Conv2d, Linear, FiLM, BatchNorm, LayerNorm, InstanceNorm, nn.GroupNorm)
"""Layers whose output is a new tensor that their own backward pass does not need."""


def _overwrite_before_relu(layers: list[nn.Module]) -> None:
    """Let each ReLU write into what it is given, where that is of no use to anything else: a tensor a use less."""
    for before, layer in pairwise(layers):
        if isinstance(layer, nn.ReLU) and isinstance(before, _FRESH):
            layer.inplace = True


def make_basis(time: str, knots: int | None = None) -> Basis | None:
    """The basis over [0, 1] that ``time`` names, or None where parameters do not vary.

    Raises:
        InvalidInput: for ``knots`` below 1, or given where parameters do not vary.
    """
    if time in BASES:
        return Basis(time, knots_of(time) if knots is None else knots)
    if knots is not None:
        raise InvalidInput(f"knots is {knots}, and with time={time!r} no parameter varies: choose {', '.join(BASES)}")
    return None


class _Parts:
    """Makes the layers of one branch: a method for each kind, (channels in, width inside, channels out)."""

    def __init__(
        self,
        stack: Stack,
        concat: bool,
        film: bool,
        size: tuple[int, int] | None,
        stride: int,
        depth: float,
        activated: bool,
    ) -> None:
        self.stack, self.concat, self.film = stack, concat, film
        self.size, self.stride, self.depth = size, stride, depth
        self.activated = activated
        """Whether what the next layer is given comes from an activation."""

    def basic(self, c: int, w: int, o: int) -> Iterator[nn.Module]:
        yield self.conv(c, w, 3, self.stride)
        yield from self.norm(w)
        yield self.act()
        yield self.drop()
        yield self.conv(w, o, 3)
        yield from self.norm(o)
        yield self.path()

    def preact(self, c: int, w: int, o: int) -> Iterator[nn.Module]:
        yield from self.norm(c)
        yield self.act()
        yield self.conv(c, w, 3, self.stride)
        yield from self.norm(w)
        yield self.act()
        yield self.drop()
        yield self.conv(w, o, 3)
        yield self.path()

    def bottleneck(self, c: int, w: int, o: int) -> Iterator[nn.Module]:
        yield self.conv(c, w, 1)
        yield from self.norm(w)
        yield self.act()
        yield self.conv(w, w, 3, self.stride)
        yield from self.norm(w)
        yield self.act()
        yield self.drop()
        yield self.conv(w, o, 1)
        yield from self.norm(o)
        yield self.path()

    def convnext(self, c: int, w: int, o: int) -> Iterator[nn.Module]:
        yield self.conv(c, c, 7, self.stride, groups=c)
        yield from self.norm(c)
        yield self.conv(c, w, 1)
        yield self.act()
        yield self.drop()
        yield self.conv(w, o, 1)
        yield LayerScale(o)
        yield self.path()

    def mlp(self, c: int, w: int, o: int) -> Iterator[nn.Module]:
        yield self.linear(c, w)
        yield from self.norm(w)
        yield self.act()
        yield self.drop()
        yield self.linear(w, o, bias=True)
        yield self.path()

    def conv(self, c: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        if stride > 1 and self.size is not None:
            self.size = (-(-self.size[0] // stride), -(-self.size[1] // stride))
        activated, self.activated = self.activated, False
        options = {"stride": stride, "groups": groups, "time": self.concat, "activated": activated}
        return self.stack.conv_layer(c, o, kernel, depth=self.depth, **options)

    def linear(self, c: int, o: int, bias: bool | None = None) -> nn.Module:
        bias = self.stack.norm == "none" if bias is None else bias
        return self.stack.linear_layer(c, o, time=self.concat, depth=self.depth, bias=bias)

    def norm(self, channels: int) -> Iterator[nn.Module]:
        yield self.stack.norm_layer(channels, self.size)
        if self.film:
            yield FiLM(channels)

    def act(self) -> nn.Module:
        self.activated = True
        return self.stack.activation_layer()

    def drop(self) -> nn.Module:
        return self.stack.dropout_layer(self.depth)

    def path(self) -> nn.Module:
        return self.stack.path_dropout_layer(self.depth)
