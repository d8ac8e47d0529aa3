"""What a layer makes, and who takes it: read off the operations of one evaluation of a network.

The order of modules in a model does not say what is computed. So the network is evaluated once, every operation is
seen as it is dispatched, and for each output of a layer it is noted which operations take it, or a view of it, and
where they stand: in which part of the network (stem, a step's branch or shortcut or post, its sum, head), and in which
of the layers watched.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resode.dynamics.step import Step
from resode.dynamics.view import ResidualDynamics

Place = tuple[str, int]
"""A part and the step it belongs to (−1 for stem and head)."""


@dataclass
class Output:
    """What ``maker`` gave.

    Args:
        place: the part in which it was made.
        takers: the places and (innermost) watched layers of the operations that took it since; None is no such layer.
    """

    maker: nn.Module
    tensor: Tensor
    place: Place
    takers: set[tuple[Place, nn.Module | None]] = field(default_factory=set)


class Trace(TorchDispatchMode):
    """One evaluation of a network.

    Args:
        view: the network.
        x: what to evaluate it on.
        watched: layers whose outputs are followed, or that are told apart as takers.

    ``outputs`` are those of the watched layers in the order of making, and ``calls`` how often each was called.
    """

    def __init__(self, view: ResidualDynamics, x: Tensor, watched: Collection[nn.Module]) -> None:
        super().__init__()
        self.outputs: list[Output] = []
        self.calls: Counter[nn.Module] = Counter()
        self._of_storage: dict[int, Output] = {}
        self._place: Place = ("", -1)
        self._inside: list[nn.Module] = []
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in watched]
        hooks += [layer.register_forward_hook(self._leave) for layer in watched]
        try:
            with view.evaluation(), self:
                self.logits = self._run(view, x)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, view: ResidualDynamics, x: Tensor) -> Tensor:
        h = self._at(("stem", -1), view.stem)(x)
        for i, step in enumerate(view.steps):
            h = self._at(("sum", i), self._marked(step, i))(h)
        return self._at(("head", -1), view.head)(h)

    def _marked(self, step: Step, i: int) -> Step:
        parts = {name: getattr(step, name) for name in ("shortcut", "branch", "post")}
        return replace(step, **{name: part and self._at((name, i), part) for name, part in parts.items()})

    def _at(self, place: Place, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``part``, standing in ``place``."""

        def call(*arguments: Any) -> Tensor:
            before, self._place = self._place, place
            try:
                return part(*arguments)
            finally:
                self._place = before

        return call

    def _enter(self, layer: nn.Module, inputs: Any) -> None:
        self.calls[layer] += 1
        self._inside.append(layer)

    def _leave(self, layer: nn.Module, inputs: Any, out: Any) -> None:
        self._inside.pop()
        if isinstance(out, Tensor):
            # The output is kept, so that no other tensor comes to lie in its place.
            output = Output(layer, out, self._place)
            self.outputs.append(output)
            self._of_storage[out.untyped_storage().data_ptr()] = output

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        options = options or {}
        for value in tree_leaves((arguments, options)):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                output = self._of_storage.get(value.untyped_storage().data_ptr())
                if output is not None:
                    output.takers.add((self._place, self._inside[-1] if self._inside else None))
        return operation(*arguments, **options)
