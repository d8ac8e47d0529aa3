"""What a net is: its settings, checked when they are made, and nothing built yet."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from resode.blocks.branch import KINDS, TIMES, make_basis
from resode.blocks.compiled import COMPILE_MODES
from resode.blocks.residual import SHORTCUTS, make_scale
from resode.blocks.settings import check_extras, check_solver
from resode.data.augment import Augment
from resode.errors import InvalidInput, choose, positive
from resode.stack import Dropout, Stack

NETS = ("lenet5", "alexnet", "vgg", "plain", "resnet", "odenet")
ON_POINTS = ("plain", "resnet", "odenet")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a net is, whatever the data it is for.

    Args:
        net: lenet5, alexnet, vgg, plain, resnet or odenet.
        depth: 6n + 2 for plain and resnet: 3 stages of n blocks (of two layers each, for basic and preact).
        width: channels of the first stage of plain, resnet and odenet; they double from stage to stage.
        kind: residual branch: basic (post-activation), preact, bottleneck, convnext, mlp (points).
        expansion: width inside a branch over its channels; by default 1 (basic, preact), 1/4 (bottleneck), 4.
        shortcut: where a block changes the shape: pad (zeros, option A) or projection (1x1 convolution, option B).
        scale: factor of the branch in blocks that keep the shape: a number, skipinit, 1/L or 1/sqrt(L), L a stage.
        tied: one branch shared by the equal blocks of a stage of resnet.
        blocks: blocks of vgg, each followed by a pooling.
        convs: convolutions in each block of vgg: one number, or one a block (VGG-11 is 1 1 2 2 2).
        time: how f depends on t: none, concat (a time channel), film (scale and shift), or weights that vary with t:
            constant (on pieces), linear (between knots), fourier (a smooth basis).
        knots: values of each weight that varies: pieces, knots or basis functions; by default those of one piece a step
            of a fixed grid (linear: one more), of 4 pieces for tolerances, and one a block if tied.
        solver: how an ODE block is solved: euler, midpoint, heun, ralston, rk4, rk4-38, explicit_adams, implicit_adams
            make equal steps; the embedded pairs bosh3, tsit5, dopri5, dopri8, adaptive_heun estimate their error, and
            choose their steps by rtol and atol, unless steps are given.
        steps: equal steps in each ODE block: one number, or one a stage; None: 8, but for an embedded pair its own.
        rtol: relative tolerance of the error of one step that is chosen; 0.001 if not given.
        atol: absolute tolerance of it; 0.001 if not given.
        max_steps: give a solve that chooses its steps up after so many.
        gradient: how a solve is differentiated: backprop (exact, keeps every evaluation of f), checkpoint (exact, keeps
            the state at each step), reversible (exact for a solver of its own, keeps nothing), adjoint (approximate,
            keeps nothing; the run says how far off it is).
        compile: compile each step of a solve, and in training the rest of the net, into graphs: minutes at first, and
            faster afterwards where it is bound by launches and memory (on a CPU seldom).
        compile_mode: torch.compile's mode: default; reduce-overhead records the kernels in CUDA graphs, which launch at
            once; max-autotune tries kernels as well; max-autotune-no-cudagraphs does that alone.
        mask_intervals: intervals of t with dropout masks of their own (1: once a solve).
        extra_channels: channels of zeros added to the state of each ODE block, and dropped after it, which give its
            paths room to pass each other (augmented neural ODEs).
        kinetic: weight in the loss of the kinetic energy, the mean of |f|^2 along the path: straighter paths.
        jacobian: weight in the loss of the mean of |df/dh|^2 along the path, estimated: more regular paths.
        steer: in training, end each solve at a random time within this distance of its end: simpler paths.

    Raises:
        InvalidInput: for an unknown name or a number that makes no sense.
    """

    net: Literal["lenet5", "alexnet", "vgg", "plain", "resnet", "odenet"] = "resnet"
    depth: int = 20
    width: int = 16
    kind: Literal["basic", "preact", "bottleneck", "convnext", "mlp"] = "basic"
    expansion: float | None = None
    shortcut: Literal["pad", "projection"] = "pad"
    scale: float | str = 1.0
    tied: bool = False
    blocks: int = 3
    convs: int | tuple[int, ...] = 2
    time: Literal["none", "concat", "film", "constant", "linear", "fourier"] = "concat"
    knots: int | None = None
    solver: Literal[
        "euler",
        "midpoint",
        "heun",
        "ralston",
        "rk4",
        "rk4-38",
        "bosh3",
        "tsit5",
        "dopri5",
        "dopri8",
        "adaptive_heun",
        "explicit_adams",
        "implicit_adams",
    ] = "rk4"
    steps: int | tuple[int, ...] | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 10_000
    gradient: Literal["backprop", "checkpoint", "reversible", "adjoint"] = "backprop"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    mask_intervals: int = 1
    extra_channels: int = 0
    kinetic: float = 0.0
    jacobian: float = 0.0
    steer: float = 0.0

    @property
    def compiled(self) -> bool | str:
        """The mode of torch.compile that is asked for, or False."""
        return self.compile and self.compile_mode

    def __post_init__(self) -> None:
        choose(self.net, NETS, "net")
        choose(self.kind, KINDS, "branch kind")
        choose(self.shortcut, SHORTCUTS, "shortcut")
        choose(self.time, TIMES, "time conditioning")
        choose(self.compile_mode, COMPILE_MODES, "compile mode")
        make_basis(self.time, self.knots)
        make_scale(self.scale, 1)
        if not isinstance(self.scale, str) and not math.isfinite(self.scale):
            raise InvalidInput(f"scale is {self.scale}: a finite number is expected")
        if self.expansion is not None:
            positive(self.expansion, "expansion")
        for name in ("depth", "width", "blocks", "mask_intervals"):
            if not _whole(getattr(self, name)):
                raise InvalidInput(f"{name} is {getattr(self, name)!r}: a whole number of at least 1 is needed")
        if self.net in ("plain", "resnet") and (self.depth < 8 or (self.depth - 2) % 6):
            near = max(8, 6 * round((self.depth - 2) / 6) + 2)
            raise InvalidInput(
                f"depth {self.depth} of {self.net} is not of the form 6n + 2 with n ≥ 1 (3 stages of n blocks of 2 "
                f"layers, a stem and a head): {near} is near"
            )
        for steps in each(self.steps):
            check_solver(self.solver, steps, self.rtol, self.atol, gradient=self.gradient, max_steps=self.max_steps)
        check_extras(self.extra_channels, self.kinetic, self.jacobian, self.steer)
        if not all(map(_whole, each(self.convs))) or len(each(self.convs)) not in (1, self.blocks):
            raise InvalidInput(f"convs is {self.convs} for {self.blocks} blocks of vgg: one number, or one a block")


@dataclass(frozen=True, kw_only=True)
class NetConfig(Architecture):
    """A net for some data: the architecture, its stack, and the shape of input and output.

    Args:
        stack: normalization, activation, dropout, convolution and augmentation.
        channels: channels of the input images (or coordinates of the input points).
        size: (H, W) of the input images, None for points.
        classes: number of classes.

    Raises:
        InvalidInput: as :class:`Architecture`, and for a net that cannot take such an input.
    """

    stack: Stack = field(default_factory=Stack)
    channels: int = 3
    size: tuple[int, int] | None = (32, 32)
    classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        size = (1, 1) if self.size is None else each(self.size)
        if not (all(map(_whole, (self.channels, self.classes, *size))) and self.classes >= 2 and len(size) == 2):
            raise InvalidInput(
                f"a net for {self.channels} channels of size {self.size} and {self.classes} classes: whole numbers are "
                "needed, at least 1 channel, 2 classes, and 1 pixel of (H, W) (None for points)"
            )
        if self.size is None:
            choose(self.net, ON_POINTS, "net for points (2-D data)")
            if self.kind != "mlp":
                raise InvalidInput(f"branch kind {self.kind!r} needs images, and this data are points: use kind 'mlp'")
            if self.stack.conv != "standard":
                raise InvalidInput(
                    f"{self.stack.conv} convolutions need images, and this data are points: use standard"
                )
            if self.stack.norm == "instance":
                raise InvalidInput("instance norm needs images, and this data are points: use another norm")
        elif self.kind == "mlp" and self.net in ON_POINTS:
            raise InvalidInput("branch kind 'mlp' needs points (moons, circles), and this data are images")
        elif min(self.size) < (least := _least_size(self)):
            raise InvalidInput(
                f"{self.net} halves its images too often for {self.size[0]}×{self.size[1]} pixels: it needs at least "
                f"{least}×{least}"
            )
        if self.net == "odenet" and len(each(self.steps)) not in (1, self.stages):
            raise InvalidInput(f"steps is {self.steps} for {self.stages} stages: give one number, or one a stage")

    @property
    def stages(self) -> int:
        """Stages of plain, resnet and odenet."""
        return 1 if self.size is None else 3

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetConfig":
        """The configuration that ``dataclasses.asdict`` (and JSON) made ``values`` of.

        Raises:
            InvalidInput: for a name that is no setting, or a value that makes no sense.
        """
        stack = dict(values.get("stack", {}))
        parts = {name: dict(stack.get(name, {})) for name in ("dropout", "augment")}
        held = {cls: values, Stack: stack, Dropout: parts["dropout"], Augment: parts["augment"]}
        unknown = [name for kind, given in held.items() for name in set(given) - {f.name for f in fields(kind)}]
        if unknown:
            raise InvalidInput(f"unknown settings of a net: {', '.join(sorted(unknown))}")
        stack |= {"dropout": Dropout(**parts["dropout"]), "augment": Augment(**parts["augment"])}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "stack"}
        return cls(**plain, stack=Stack(**stack))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; :meth:`from_dict` inverts it."""
        return asdict(self)


def each(value: int | tuple[int, ...] | None) -> tuple[int | None, ...]:
    """One number (or None), or one for each part of a net, as a tuple."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _least_size(config: NetConfig) -> int:
    if config.net == "lenet5":
        return 12
    if config.net == "alexnet":
        return 8
    return 2**config.blocks if config.net == "vgg" else 4
