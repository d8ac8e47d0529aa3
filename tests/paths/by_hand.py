"""Nets taken apart and run by hand, from their modules: what changed networks must compute."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from resode import NetConfig, ODEBlock, Parts, ResidualBlock, Step, build, dynamics, evaluate
from resode.nets import PlainLayer

FAMILIES: dict[str, dict[str, Any]] = {
    "basic": {"net": "resnet", "depth": 20},
    "preact": {"net": "resnet", "depth": 20, "kind": "preact", "shortcut": "projection", "scale": 0.7},
    "tied": {"net": "resnet", "depth": 20, "tied": True},
    "plain": {"net": "plain", "depth": 14},
    "vgg": {"net": "vgg", "blocks": 2, "convs": (3, 2), "channels": 64},
    "midpoint": {"net": "odenet", "kind": "preact", "solver": "midpoint", "steps": (3, 2, 1)},
    "rk4": {"net": "odenet", "kind": "preact", "solver": "rk4", "steps": (3, 2, 1)},
    "hand": {},
}
"""In each of them the first three steps are of one shape, and can be deleted."""


class Hand(nn.Module):
    """A net that nothing knows how to read, with activations that overwrite what they are given."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.narrow = nn.Linear(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.overwrite = nn.ReLU(inplace=True)
        self.last = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

    def forward(self, x):
        h = self.first(x)
        for i, block in enumerate(self.blocks):
            h = self.after(i, h + 0.5 * block(h).tanh())
        h = self.narrow(h)
        for layer in self.layers:
            h = layer(self.overwrite(h))
        return self.last(h)

    def after(self, i, h):
        """Two of the blocks end with a ReLU in place."""
        return self.overwrite(h) if i % 2 else h

    def read(self):
        steps = [
            Step(
                kind="residual",
                branch=lambda t, h, f=block: f(h).tanh(),
                post=lambda h, i=i: self.after(i, h),
                scale=0.5,
                label=f"block {i}",
            )
            for i, block in enumerate(self.blocks)
        ]
        steps.append(Step(kind="transition", branch=lambda t, h: self.narrow(h), label="narrow", stage=1))
        steps += [
            Step(kind="plain", branch=lambda t, h, f=layer: f(self.overwrite(h)), label=f"layer {i}", stage=1)
            for i, layer in enumerate(self.layers)
        ]
        return Parts(self.first, steps, self.last, shape=(5,))


@dataclass(frozen=True)
class Unit:
    """A step: h ↦ post(shortcut(h) + scale·branch(h)), or h ↦ branch(h) without a shortcut."""

    branch: Callable
    shortcut: Callable | None = None
    post: Callable = lambda h: h
    scale: float = 1.0
    stage: int = 0
    t: float = 0.0
    end: float | None = None
    deletable: bool = True
    movable: bool = True
    factor: float = 1.0
    gone: bool = False

    def __call__(self, h):
        h = h.clone()  # whatever is overwritten is nobody else's
        if self.shortcut is None:
            return h if self.gone else self.factor * self.branch(h)
        whole = self.shortcut(h)
        if not self.gone:
            whole = whole + self.factor * self.scale * self.branch(h)
        return self.post(whole)


def net_of(family, **settings):
    """A small net of random weights in double precision, in evaluation mode; its batch norms have seen data."""
    if family == "hand":
        torch.manual_seed(1)
        return Hand().double().eval()
    config = NetConfig(**{"width": 4, "channels": 2, "size": (8, 8), "classes": 4, **FAMILIES[family], **settings})
    net = build(config, seed=1).double()
    with torch.no_grad():
        for _ in range(3):
            net(inputs(family, 8))
    return net.eval()


def view_of(net, grid=None):
    return dynamics(net, read=Hand.read) if isinstance(net, Hand) else dynamics(net, grid=grid)


def inputs(family, count, seed=2):
    shape = (5,) if family == "hand" else (FAMILIES[family].get("channels", 2), 8, 8)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(family, sizes=(6, 5), classes=4):
    generator = torch.Generator().manual_seed(3)
    return [
        (inputs(family, n, seed=n + i), torch.randint(classes, (n,), generator=generator)) for i, n in enumerate(sizes)
    ]


# Taking apart


def units_of(net, grid=None):
    """The steps of ``net``; of an ODE block those on ``grid`` equal steps, if given."""
    if isinstance(net, Hand):
        blocks = [
            Unit(lambda h, f=f: f(h).tanh(), lambda h: h, lambda h, i=i: h.relu() if i % 2 else h, 0.5)
            for i, f in enumerate(net.blocks)
        ]
        layers = [Unit(lambda h, f=f: f(h.relu()), stage=1) for f in net.layers]
        return [*blocks, Unit(net.narrow, stage=1, deletable=False, movable=False), *layers]
    return [unit for i, stage in enumerate(net.stages) for module in stage for unit in _units(module, i, grid)]


def _units(module, stage, grid):
    if isinstance(module, ODEBlock):
        method, count = {"midpoint": midpoint, "rk4": rk4}[module.solver], grid or module.steps
        for i in range(count):
            t, end = i / count, (i + 1) / count
            yield Unit(
                lambda h, t=t, d=1 / count: method(module.branch, t, d, h), lambda h: h, stage=stage, t=t, end=end
            )
    elif isinstance(module, ResidualBlock):
        resizes = not isinstance(module.shortcut, nn.Identity)
        block = partial(evaluate, module.branch, module.t)
        yield Unit(block, module.shortcut, module.post, module.scale, stage, module.t, movable=not resizes)
    else:
        convolution = module.layers[0] if isinstance(module, PlainLayer) else None
        keeps = convolution is not None and (convolution.in_channels, convolution.stride) == (
            convolution.out_channels,
            (1, 1),
        )
        yield Unit(module, stage=stage, deletable=keeps, movable=convolution is not None)


def midpoint(f, t, d, h):
    return d * evaluate(f, t + d / 2, h + d / 2 * evaluate(f, t, h))


def rk4(f, t, d, h):
    k1 = evaluate(f, t, h)
    k2 = evaluate(f, t + d / 2, h + d / 2 * k1)
    k3 = evaluate(f, t + d / 2, h + d / 2 * k2)
    k4 = evaluate(f, t + d, h + d * k3)
    return d / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@torch.no_grad()
def logits_of(net, units, x):
    stem, head = (net.first, net.last) if isinstance(net, Hand) else (net.stem, net.head)
    h = stem(x)
    for unit in units:
        h = unit(h)
    return head(h)


# Changing


def without(units, places):
    return [replace(unit, gone=True) if i in places else unit for i, unit in enumerate(units)]


def scaled(units, factor, places):
    return [replace(unit, factor=factor * unit.factor) if i in places else unit for i, unit in enumerate(units)]


def reordered(units, order, places):
    units = list(units)
    moved = [units[places[i]] for i in order]
    for place, unit in zip(places, moved, strict=True):
        units[place] = unit
    return units


def deletable(units, stage=None):
    return [i for i, unit in enumerate(units) if unit.deletable and stage in (None, unit.stage)]
