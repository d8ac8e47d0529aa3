"""A network as head ∘ step_L ∘ … ∘ step_1 ∘ stem."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from resode.dynamics.step import Map, Step
from resode.errors import InvalidInput
from resode.nets.net import evaluating


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

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """The states before the first step, after the first, …, after the last."""
        h = self.stem(x)
        yield h
        for step in self.steps:
            h = step(h)
            yield h

    def evaluation(self) -> AbstractContextManager[None]:
        """The model in evaluation mode and no gradients; its modules' modes are restored afterwards."""
        return torch.no_grad() if self.model is None else evaluating(self.model)

    def with_steps(self, steps: Sequence[Step]) -> "ResidualDynamics":
        """The same stem and head around other steps."""
        return ResidualDynamics(self.stem, steps, self.head, self.model)

    def measured(self, x: Tensor) -> "ResidualDynamics":
        """The same steps with the shapes that they meet on the input ``x``."""
        return self.measured_to_end(x)[0]

    def measured_to_end(self, x: Tensor) -> "tuple[ResidualDynamics, Tensor]":
        """:meth:`measured`, and the state after the last step."""
        shapes = []
        with self.evaluation():
            for h in self.states(x):
                shapes.append(tuple(h.shape[1:]))
        steps = [replace(step, shapes=pair) for step, pair in zip(self.steps, pairwise(shapes), strict=True)]
        return self.with_steps(steps), h
