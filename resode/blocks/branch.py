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

Time reaches a branch in one of three ways: ``none``; ``concat``, a constant channel of value t before every
convolution, computed as the map t·K (Chen et al. 2018 concatenate); ``film``, a scale and shift by an embedding of t
after every norm. A batch or instance norm removes what is constant over all that it averages, so of a time channel in
the convolution before it only the borders remain (and nothing in a linear layer or a 1×1 convolution, whose weights
for t then get no gradient): with those norms ``film`` lets more of t through.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from resode.errors import InvalidInput, choose
from resode.layers.conv import Conv2d, Linear
from resode.layers.modulation import FiLM, LayerScale
from resode.stack import Stack

KINDS = ("basic", "preact", "bottleneck", "convnext", "mlp")
TIMES = ("none", "concat", "film")
POST_ACTIVATION = ("basic", "bottleneck")
"""Kinds whose residual block has an activation after the addition, outside the branch."""

EXPANSION = {"basic": 1.0, "preact": 1.0, "bottleneck": 0.25, "convnext": 4.0, "mlp": 4.0}


class Branch(nn.Module):
    """A residual branch ``f(t, h)``; ``branch(t, h)`` has the shape of ``h`` unless told otherwise.

    Args:
        channels: C of the state (B, C, H, W), or (B, C) for the kind "mlp".
        stack: normalization, activation, dropout and convolution of its layers.
        kind: "basic", "preact", "bottleneck", "convnext" or "mlp".
        time: "none", "concat" or "film".
        out_channels: channels of the output, C if None.
        stride: stride of the first 3×3 (or 7×7) convolution.
        expansion: width inside over ``out_channels``; the kind's own if None.
        size: (H, W) of the state, for norms with an elementwise affine map.
        depth: relative depth in the net, in [0, 1], for dropout with a linear schedule.

    Raises:
        InvalidInput: for an unknown kind or time, or a combination that makes no sense (a strided mlp, an instance
            norm on vectors).
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
        if kind == "mlp" and (stride != 1 or stack.norm == "instance" or stack.conv != "standard"):
            raise InvalidInput(
                "a branch of kind 'mlp' acts on vectors (B, C): no stride, instance norm or standardized convolution"
            )
        width = max(1, round((EXPANSION[kind] if expansion is None else expansion) * self.out_channels))
        parts = _Parts(stack, time == "concat", time == "film", size, stride, depth)
        layers = getattr(parts, kind)(channels, width, self.out_channels)
        self.layers = nn.ModuleList(layer for layer in layers if not isinstance(layer, nn.Identity))

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        """f(t, h).

        Args:
            t: time in [0, 1], a float or a tensor of no dimension.
            h: (B, C, H, W), or (B, C) for the kind "mlp".

        Raises:
            InvalidInput: when ``h`` has not the number of channels the branch was made for.
        """
        if h.ndim < 2 or h.shape[1] != self.channels:
            raise InvalidInput(f"a branch of {self.channels} channels was given a state of shape {tuple(h.shape)}")
        for layer in self.layers:
            h = layer(h, t) if isinstance(layer, Conv2d | Linear | FiLM) else layer(h)
        return h

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, time={self.time!r}"


class _Parts:
    """Makes the layers of one branch: a method for each kind, (channels in, width inside, channels out)."""

    def __init__(
        self, stack: Stack, concat: bool, film: bool, size: tuple[int, int] | None, stride: int, depth: float
    ) -> None:
        self.stack, self.concat, self.film = stack, concat, film
        self.size, self.stride, self.depth = size, stride, depth

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
        return self.stack.conv_layer(c, o, kernel, stride=stride, groups=groups, time=self.concat, depth=self.depth)

    def linear(self, c: int, o: int, bias: bool | None = None) -> nn.Module:
        bias = self.stack.norm == "none" if bias is None else bias
        return self.stack.linear_layer(c, o, time=self.concat, depth=self.depth, bias=bias)

    def norm(self, channels: int) -> Iterator[nn.Module]:
        yield self.stack.norm_layer(channels, self.size)
        if self.film:
            yield FiLM(channels)

    def act(self) -> nn.Module:
        return self.stack.activation_layer()

    def drop(self) -> nn.Module:
        return self.stack.dropout_layer(self.depth)

    def path(self) -> nn.Module:
        return self.stack.path_dropout_layer(self.depth)
