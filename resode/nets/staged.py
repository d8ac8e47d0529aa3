"""Nets of three stages after He et al. 2016: plain, residual and ODE, which differ in what stands in a stage.

For images there are three stages, at full, half and a quarter of the resolution, with w, 2w and 4w channels. A stage
has n = (depth − 2)/6 blocks of two layers; the first block of stages 2 and 3 changes the shape. In the ODE net that
block stays as it is and one ODE block takes the place of the others. For points there is one stage, of 3n blocks, on
the points themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from resode.blocks.branch import POST_ACTIVATION, Branch
from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock, make_shortcut
from resode.blocks.settings import grid_steps
from resode.layers.basis import BASES, knots_of
from resode.layers.norm import index_statistics
from resode.nets.classic import plain_layer, pooled_head
from resode.nets.config import NetConfig, each
from resode.nets.net import Net
from resode.stack import Dropout, Stack

Size = tuple[int, int] | None


def build_staged(config: NetConfig) -> Net:
    """plain, resnet or odenet."""
    stack = config.stack
    if config.size is None:
        c = config.channels
        stages = [nn.Sequential(*_Stage(config, 0, c, c, None).steps())]
        return Net(stack.input_layer(), stages, nn.Linear(c, config.classes))
    size, c, o = config.size, config.width, config.width
    stem = [stack.input_layer(), _without_dropout(stack).conv_layer(config.channels, c, 3)]
    if config.net == "plain" or config.kind in POST_ACTIVATION:
        # A pre-activation branch begins with the norm and the activation itself.
        stem += [stack.norm_layer(c, size), stack.activation_layer()]
    stages = []
    for index in range(config.stages):
        stage = _Stage(config, index, c, o, size)
        stages.append(nn.Sequential(*stage.steps()))
        size, c, o = stage.out_size, o, 2 * o
    activated = config.net != "odenet" and (config.net == "plain" or config.kind in POST_ACTIVATION)
    last = [] if activated else [stack.norm_layer(c, size), stack.activation_layer()]
    return Net(nn.Sequential(*stem), stages, pooled_head(config, c, *last))


def _without_dropout(stack: Stack) -> Stack:
    """``stack`` for what is no branch, the stem and the shortcuts: nothing is dropped there."""
    return replace(stack, dropout=Dropout())


@dataclass(frozen=True)
class _Stage:
    """Stage ``index`` from ``c`` to ``o`` channels; it halves an image of ``size`` when they differ."""

    config: NetConfig
    index: int
    c: int
    o: int
    size: Size

    @property
    def stride(self) -> int:
        return 1 if self.c == self.o else 2

    @property
    def out_size(self) -> Size:
        return None if self.size is None else tuple(-(-side // self.stride) for side in self.size)

    @property
    def blocks(self) -> int:
        """Residual blocks of a stage of plain or resnet, the one that changes the shape included."""
        return (self.config.depth - 2) // (2 * self.config.stages)

    def depth(self, done: float) -> float:
        """Relative depth in the net after the share ``done`` of this stage, for the linear schedule of dropout.

        Block i of n has done i/n. An ODE block, or a branch shared by all blocks, stands for all of them: 1/2.
        """
        return (self.index + done) / self.config.stages

    def steps(self) -> Iterator[nn.Module]:
        """What stands in the stage, in order."""
        if self.config.net == "plain":
            yield from self.plain_layers()
            return
        if self.c != self.o:
            yield self.transition()
        if self.config.net == "odenet":
            yield self.ode_block()
        else:
            yield from self.residual_blocks()

    def plain_layers(self) -> Iterator[nn.Module]:
        count = 2 * self.blocks
        for i in range(count):
            c, options = (self.c, {"stride": self.stride}) if i == 0 and self.size is not None else (self.o, {})
            depth = self.depth((i + 1) / count)
            yield plain_layer(self.config.stack, c, self.o, self.out_size, depth, activated=True, **options)

    def transition(self) -> ResidualBlock:
        """The residual block that changes the shape: no step of a flow, so it knows no time and has scale 1."""
        config, stack = self.config, self.config.stack
        branch = Branch(
            self.c,
            stack,
            config.kind,
            "none",
            self.o,
            self.stride,
            expansion=config.expansion,
            size=self.size,
            depth=self.depth(0.0 if config.net == "odenet" else 1 / self.blocks),
        )
        shortcut = make_shortcut(config.shortcut, self.c, self.o, self.stride, _without_dropout(stack), self.out_size)
        return ResidualBlock(branch, shortcut, post=self.post())

    def residual_blocks(self) -> Iterator[ResidualBlock]:
        """The blocks that keep the shape, at times t_l = l/L."""
        config, first = self.config, int(self.c != self.o)
        count = self.blocks - first
        times = [i / count for i in range(count)]
        shared = self.branch(config.time, self.depth(0.5), count) if config.tied and count else None
        if shared is not None:
            index_statistics(shared, times)
        for i, t in enumerate(times):
            # Weights of its own tell an untied block its place; time would tell it nothing more.
            branch = shared or self.branch("none", self.depth((first + i + 1) / self.blocks))
            yield ResidualBlock(branch, scale=config.scale, post=self.post(), t=t, depth=count)

    def ode_block(self) -> ODEBlock:
        config, steps = self.config, each(self.config.steps)
        count = steps[self.index % len(steps)]
        pieces = grid_steps(config.solver, count)
        knots = None if pieces is None else knots_of(config.time, pieces)
        return ODEBlock(
            self.branch(config.time, self.depth(0.5), knots, extra=config.extra_channels),
            config.solver,
            count,
            config.rtol,
            config.atol,
            gradient=config.gradient,
            compile=config.compiled,
            mask_intervals=config.mask_intervals,
            max_steps=config.max_steps,
            extra_channels=config.extra_channels,
            kinetic=config.kinetic,
            jacobian=config.jacobian,
            steer=config.steer,
        )

    def branch(self, time: str, depth: float, knots: int | None = None, extra: int = 0) -> Branch:
        """A branch that keeps the shape, of ``extra`` channels more than the stage.

        If its weights vary: with ``knots``, unless the settings say how many.
        """
        config = self.config
        return Branch(
            self.o + extra,
            config.stack,
            config.kind,
            time,
            knots=(config.knots or knots) if time in BASES else None,
            expansion=config.expansion,
            size=self.out_size,
            depth=depth,
        )

    def post(self) -> nn.Module | None:
        return self.config.stack.activation_layer() if self.config.kind in POST_ACTIVATION else None
