"""Any residual network as a list of steps in depth: what the analyses of ``paths`` and ``limits`` act on.

A step is h ↦ post(shortcut(h) + scale·branch(t, h)). A residual block is one; each step of an ODE block's fixed grid is
one, with the identity as its shortcut and the increment Δ Σ_i b_i k_i as its branch; a plain layer has no shortcut.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock, add_branch
from resode.blocks.solvers import FixedGrid, Solve, rk_step
from resode.blocks.tableaux import Tableau
from resode.errors import InvalidInput
from resode.layers.context import Field, SolveContext, evaluate
from resode.nets.net import Net, PlainLayer, evaluating

Map = Callable[[Tensor], Tensor]


def _identity(h: Tensor) -> Tensor:
    return h


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One application in depth.

    Args:
        kind: "residual"; "plain" (a layer without a shortcut: the whole map is its branch); "transition" (changes
            resolution and is neither a choice of path nor deleted, such as a pooling).
        branch: f, called as ``branch(t, h)``.
        shortcut, post, scale: as in a residual block; of no meaning for the other kinds.
        stage: index of the stage the step stands in, from 0.
        t: the time at which the branch is evaluated.
        label: what to call the step in tables and figures.
    """

    kind: Literal["residual", "plain", "transition"]
    branch: Field
    shortcut: Map = _identity
    post: Map = _identity
    scale: float | Tensor = 1.0
    stage: int = 0
    t: float = 0.0
    label: str = ""

    def __call__(self, h: Tensor) -> Tensor:
        """The state after the step."""
        if self.kind != "residual":
            return self.branch(self.t, h)
        return self.post(add_branch(self.shortcut(h), evaluate(self.branch, self.t, h), self.scale))

    def deleted(self, h: Tensor) -> Tensor:
        """The state after the step without its branch: post(shortcut(h)); for a plain step, h itself.

        Raises:
            InvalidInput: for a transition.
        """
        if self.kind == "transition":
            raise InvalidInput(f"step {self.label!r} is a transition between resolutions: it cannot be deleted")
        return self.post(self.shortcut(h)) if self.kind == "residual" else h


class ResidualDynamics:
    """A network as ``head(step_L(… step_1(stem(x))))``.

    Args:
        stem, head: maps.
        steps: the steps between them.
        model: the module that the parts belong to, so that it can be set to evaluation mode.

    Raises:
        InvalidInput: without any step.
    """

    def __init__(self, stem: Map, steps: Sequence[Step], head: Map, model: nn.Module | None = None) -> None:
        if not steps:
            raise InvalidInput("a residual dynamics needs at least one step")
        self.stem, self.steps, self.head, self.model = stem, tuple(steps), head, model

    def __call__(self, x: Tensor) -> Tensor:
        """The logits; equal to the model's in evaluation mode."""
        return self.head(self.run(self.stem(x)))

    def run(self, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The state after steps ``start`` … ``stop`` − 1, from the state ``h`` before them."""
        for step in self.steps[start:stop]:
            h = step(h)
        return h

    def evaluation(self) -> AbstractContextManager[None]:
        """The model in evaluation mode and no gradients; its modules' modes are restored afterwards."""
        return torch.no_grad() if self.model is None else evaluating(self.model)


@dataclass(frozen=True)
class Increment:
    """Branch of a solver's step: (t, h) ↦ Δ Σ_i b_i k_i from ``t`` to ``end``."""

    field: Field
    tableau: Tableau
    t: float
    end: float
    interval: tuple[float, float]

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        solve = Solve(self.field, SolveContext(*self.interval))
        solve.begin_step(self.t, self.end)
        return rk_step(solve, self.tableau, self.t, self.end, (h,), base=(torch.zeros_like(h),)).state[0]


def dynamics(model: nn.Module, example: Tensor | None = None) -> ResidualDynamics:
    """Read ``model`` as steps.

    Args:
        model: one of our nets; a ``ResidualBlock`` or ``ODEBlock``; or an ``nn.Sequential`` of these, with whatever
            modules before (the stem), between (transitions) and after (the head). It is read as it stands in
            evaluation mode.
        example: an input on which to check that the steps together are the model, in evaluation mode.

    Raises:
        InvalidInput: for a model that cannot be read (with the module in question), an ODE block without a fixed
            grid, or a view that differs from its model on ``example``.
    """
    with evaluating(model):
        view = _read_net(model) if isinstance(model, Net) else _read_sequence(model)
        if example is not None:
            _require_equal(view(example), model(example), type(model).__name__)
    return view


def _require_equal(seen: Tensor, expected: Tensor, name: str) -> None:
    if seen.shape != expected.shape:
        raise InvalidInput(
            f"the steps read from {name} give {tuple(seen.shape)} on the example, and it gives {tuple(expected.shape)}"
        )
    if not torch.allclose(seen, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        off = float((seen - expected).abs().max())
        raise InvalidInput(f"the steps read from {name} differ from it by {off:g} on the example")


def _read_net(net: Net) -> ResidualDynamics:
    stages = [list(_flat(stage)) for stage in net.stages]
    _refuse_hidden(net, [module for stage in stages for module in stage])
    steps = [
        step
        for index, stage in enumerate(stages)
        for position, module in enumerate(stage)
        for step in _read_module(module, index, f"{index + 1}.{position + 1}")
    ]
    return ResidualDynamics(net.stem, steps, net.head, net)


def _read_sequence(model: nn.Module) -> ResidualDynamics:
    modules = list(_flat(model))
    _refuse_hidden(model, modules)
    places = [i for i, module in enumerate(modules) if isinstance(module, _READABLE)]
    if not places:
        found = ", ".join(sorted({type(module).__name__ for module in modules})) or "nothing"
        readable = ", ".join(kind.__name__ for kind in _READABLE)
        raise _unreadable(model, f"it holds {found}, and none of {readable}")
    first, last = places[0], places[-1]
    steps = [step for i in range(first, last + 1) for step in _read_module(modules[i], 0, str(i - first + 1))]
    stem, head = nn.Sequential(*modules[:first]), nn.Sequential(*modules[last + 1 :])
    return ResidualDynamics(stem, steps, head, model)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module


_READABLE = (ResidualBlock, ODEBlock, PlainLayer)


def _refuse_hidden(model: nn.Module, modules: list[nn.Module]) -> None:
    for module in modules:
        if not isinstance(module, _READABLE) and any(isinstance(part, _READABLE) for part in module.modules()):
            raise _unreadable(
                model, f"the steps within {type(module).__name__} stand in an order that only its forward knows"
            )


def _unreadable(model: nn.Module, why: str) -> InvalidInput:
    return InvalidInput(
        f"cannot read a {type(model).__name__} as steps: {why}; describe it by hand with "
        "ResidualDynamics(stem, steps, head)"
    )


def _read_module(module: nn.Module, stage: int, label: str) -> Iterator[Step]:
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
        yield from _read_ode(module, stage, label)
    else:
        kind = "plain" if isinstance(module, PlainLayer) else "transition"
        yield Step(kind=kind, branch=lambda t, h: module(h), stage=stage, label=label)


def _read_ode(block: ODEBlock, stage: int, label: str) -> Iterator[Step]:
    scheme = block.scheme()
    if not isinstance(scheme, FixedGrid):
        raise InvalidInput(
            f"the ODE block {label} is solved by {block.solver}, which has no steps of a fixed grid, each from the "
            "state before it alone: read the net within resode.solver_settings(net, solver='rk4', steps=32), say"
        )
    if block.gradient == "reversible":
        raise InvalidInput(
            f"the ODE block {label} is reversible: its steps act on two coupled states, and are no residual steps; "
            "read the net within resode.solver_settings(net, gradient='backprop'), say"
        )
    extra = block.extra_channels
    if extra:
        yield Step(kind="transition", branch=lambda t, h: block.augment(h), stage=stage, label=f"{label} augment")
    for start, end in pairwise(scheme.grid):
        branch = Increment(block.branch, scheme.tableau, start, end, (block.t0, block.t1))
        yield Step(kind="residual", branch=branch, stage=stage, t=start, label=f"{label} t={start:.3g}")
    if extra:
        yield Step(kind="transition", branch=lambda t, h: h[:, :-extra], stage=stage, label=f"{label} project")
