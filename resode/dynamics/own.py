"""Reading our own nets and blocks, and sequences of them."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.dynamics.ode import Grid, read_ode
from resode.dynamics.parts import Parts, children_of, unreadable
from resode.dynamics.step import Step
from resode.nets.net import Net, PlainLayer

READABLE = (ResidualBlock, ODEBlock, PlainLayer)

Accepted = Mapping[ODEBlock, Sequence[float]]
"""The points of the steps that adaptive blocks made on an example."""


def read_net(net: Net, grid: Grid | None, accepted: Accepted) -> Parts:
    """One of our nets: its stages' modules are the steps."""
    stages = [list(_flat(stage)) for stage in net.stages]
    _refuse_hidden(net, [module for stage in stages for module in stage])
    steps = [
        step
        for index, stage in enumerate(stages)
        for position, module in enumerate(stage)
        for step in _read_module(module, index, f"{index + 1}.{position + 1}", grid, accepted)
    ]
    return Parts(net.stem, steps, net.head, net.input_shape)


def read_sequence(model: nn.Module, grid: Grid | None, accepted: Accepted) -> Parts:
    """A block of ours, or an ``nn.Sequential`` with blocks of ours: what stands before and after is stem and head."""
    modules = list(_flat(model))
    _refuse_hidden(model, modules)
    places = [i for i, module in enumerate(modules) if isinstance(module, READABLE)]
    if not places:
        found = ", ".join(sorted({type(module).__name__ for module in modules})) or "nothing"
        readable = ", ".join(kind.__name__ for kind in READABLE)
        inside = children_of(model) if modules == [model] else found
        raise unreadable(model, f"it holds {inside}, and none of {readable}")
    first, last = places[0], places[-1]
    steps = [
        step for i in range(first, last + 1) for step in _read_module(modules[i], 0, str(i - first + 1), grid, accepted)
    ]
    return Parts(nn.Sequential(*modules[:first]), steps, nn.Sequential(*modules[last + 1 :]))


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module


def _refuse_hidden(model: nn.Module, modules: list[nn.Module]) -> None:
    for module in modules:
        if not isinstance(module, READABLE) and any(isinstance(part, READABLE) for part in module.modules()):
            raise unreadable(
                model, f"the steps within {type(module).__name__} stand in an order that only its forward knows"
            )


def _read_module(module: nn.Module, stage: int, label: str, grid: Grid | None, accepted: Accepted) -> Iterator[Step]:
    if isinstance(module, ResidualBlock):
        yield Step(
            kind="residual",
            branch=module.branch,
            shortcut=module.shortcut,
            post=module.post,
            scale=module.scale,
            stage=stage,
            t=module.t,
            label=label,
        )
    elif isinstance(module, ODEBlock):
        yield from read_ode(module, stage, label, grid, accepted.get(module))
    else:
        kind = "plain" if isinstance(module, PlainLayer) else "transition"
        yield Step(kind=kind, branch=lambda t, h: module(h), stage=stage, label=label)
