"""The stack: the settings of normalization, dropout, activation, convolution and augmentation.

One frozen :class:`Stack` builds the layers of the residual net and of the ODE net, and gives the training loop its
augmentation, so that a comparison of the two depths changes nothing else.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from resode.data.augment import Augment
from resode.errors import choose, probability
from resode.layers.conv import Conv2d, Linear, activation_gain
from resode.layers.dropout import DROPOUTS
from resode.layers.dropout import Dropout as DropoutLayer
from resode.layers.noise import GaussianNoise, deviation
from resode.layers.norm import AFFINES, NORMS, make_norm

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
CONVOLUTIONS = ("standard", "weight-standardized", "scaled-weight-standardized")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Dropout:
    """Dropout in every branch (or layer, where a net has no branches).

    Args:
        kind: unit (elements), spatial (channels), dropconnect (weights), cutout (rectangles), path (whole branches;
            a net of plain layers has none).
        p: probability of a drop, in [0, 1).
        schedule: over depth: constant, or linear (p·l/L at block l of L, as in Huang et al. 2016, section 3).
        inverted: scale by 1/(1-p) in training; otherwise by 1-p in evaluation.

    Raises:
        InvalidInput: for an unknown kind or schedule, or p outside [0, 1).
    """

    kind: Literal["unit", "spatial", "dropconnect", "cutout", "path"] = "unit"
    p: float = 0.0
    schedule: Literal["constant", "linear"] = "constant"
    inverted: bool = True

    def __post_init__(self) -> None:
        choose(self.kind, DROPOUTS, "dropout")
        probability(self.p, "dropout p")
        choose(self.schedule, SCHEDULES, "dropout schedule")

    def at(self, depth: float) -> float:
        """p at a relative depth in [0, 1]."""
        return self.p * depth if self.schedule == "linear" else self.p


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The settings that a residual net and an ODE net share, and the makers of their layers.

    Args:
        norm: normalization: batch, layer, pixel, instance, group, none.
        norm_affine: "channel", or for layer norm "elementwise" (one scale and shift an element).
        activation: relu, leaky-relu, elu, gelu, silu, softplus, tanh, sigmoid.
        dropout: dropout in the branches.
        input_dropout: probability with which each element of the input is dropped.
        input_noise: standard deviation of Gaussian noise on the input, in training.
        conv: standard; weight-standardized; or scaled-weight-standardized, with a learned gain a channel and the gain
            of the activation (for nets without norm: see ``layers.conv``).
        augment: augmentation of the training images.

    Raises:
        InvalidInput: for an unknown name, a probability outside [0, 1), or a deviation that is negative or not finite.
    """

    norm: Literal["batch", "layer", "pixel", "instance", "group", "none"] = "batch"
    norm_affine: Literal["channel", "elementwise"] = "channel"
    activation: Literal["relu", "leaky-relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"] = "relu"
    dropout: Dropout = field(default_factory=Dropout)
    input_dropout: float = 0.0
    input_noise: float = 0.0
    conv: Literal["standard", "weight-standardized", "scaled-weight-standardized"] = "standard"
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        choose(self.norm, NORMS, "norm")
        choose(self.norm_affine, AFFINES, "affine map of a norm")
        choose(self.activation, ACTIVATIONS, "activation")
        choose(self.conv, CONVOLUTIONS, "convolution")
        probability(self.input_dropout, "input dropout p")
        deviation(self.input_noise)

    def norm_layer(self, channels: int, size: tuple[int, int] | None = None) -> nn.Module:
        """The norm, for states of ``channels`` channels (of image size ``size``: elementwise affine maps need it)."""
        return make_norm(self.norm, channels, size, self.norm_affine)

    def activation_layer(self) -> nn.Module:
        """The activation."""
        return ACTIVATIONS[self.activation]()

    def conv_layer(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        time: bool = False,
        depth: float = 1.0,
        activated: bool = False,
    ) -> Conv2d:
        """A convolution; it has a bias when the stack has no norm (a norm's shift does the bias's work).

        Args:
            activated: its input comes from the stack's activation, whose gain scaled standardized weights then have.
        """
        scaled = self.conv == "scaled-weight-standardized"
        return Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=groups,
            bias=self.norm == "none",
            time=time,
            standardized=self.conv == "weight-standardized",
            scaled=scaled,
            input_gain=activation_gain(self.activation_layer()) if scaled and activated else 1.0,
            dropconnect=self._dropconnect(depth),
            inverted=self.dropout.inverted,
        )

    def linear_layer(
        self, in_features: int, out_features: int, *, time: bool = False, depth: float = 1.0, bias: bool = True
    ) -> Linear:
        """A linear layer."""
        return Linear(
            in_features,
            out_features,
            bias=bias,
            time=time,
            dropconnect=self._dropconnect(depth),
            inverted=self.dropout.inverted,
        )

    def _dropconnect(self, depth: float) -> float:
        return self.dropout.at(depth) if self.dropout.kind == "dropconnect" else 0.0

    def dropout_layer(self, depth: float = 1.0) -> nn.Module:
        """Dropout of the state inside a branch; the identity when the stack's dropout acts elsewhere."""
        return self._dropout(("unit", "spatial", "cutout"), depth)

    def path_dropout_layer(self, depth: float = 1.0) -> nn.Module:
        """Dropout of a whole branch (stochastic depth), for the branch's end."""
        return self._dropout(("path",), depth)

    def _dropout(self, kinds: tuple[str, ...], depth: float) -> nn.Module:
        p = self.dropout.at(depth)
        if self.dropout.kind not in kinds or p == 0.0:
            return nn.Identity()
        return DropoutLayer(p, self.dropout.kind, self.dropout.inverted)

    def input_layer(self) -> nn.Module:
        """What training does to the net's input: noise, then dropout; the identity where the stack has neither."""
        if self.input_noise == 0.0:
            return self.input_dropout_layer()
        noise = GaussianNoise(self.input_noise)
        return noise if self.input_dropout == 0.0 else nn.Sequential(noise, self.input_dropout_layer())

    def input_dropout_layer(self) -> nn.Module:
        """Dropout of single elements of the net's input (pixels, or coordinates of points)."""
        if self.input_dropout == 0.0:
            return nn.Identity()
        return DropoutLayer(self.input_dropout, "unit", self.dropout.inverted)
