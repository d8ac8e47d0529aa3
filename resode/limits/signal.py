"""Signal and gradient by depth: how large are states and gradients, and which way does the gradient go?

Back through a step h ↦ post(h + scale·f(h)) a cotangent v becomes v through the shortcut, plus scale·vᵀ∂f through the
branch. Near the identity the first is all of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from resode.dynamics import ResidualDynamics, Step
from resode.limits.record import Record
from resode.limits.samples import Data, count, take
from resode.limits.stretches import stretches
from resode.paths.graded import GradedStep
from resode.paths.linear import Linear
from resode.paths.passes import cotangent, differentiating, states_of

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, classes) and labels (B,) to one number, a sum over the samples."""


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy, summed over the samples."""
    return F.cross_entropy(logits, labels, reduction="sum")


@dataclass(frozen=True)
class StepSignal(Record):
    """How the gradient passes a residual step.

    Norms are root mean squares over the samples.

    Args:
        label: the step's.
        stage: index of its stage.
        index: which step of the network it is.
        shortcut: of what comes through the shortcut.
        branch: of what comes through the branch.
        cosine: their inner product, summed over the samples, over the product of their norms: the square of the
            gradient before the step is shortcut² + branch² + 2·cosine·shortcut·branch. 0 where one of them is 0.
    """

    label: str
    stage: int
    index: int
    shortcut: float
    branch: float
    cosine: float


@dataclass(frozen=True)
class Signal(Record):
    """A net on ``count`` samples.

    Args:
        states: root mean square over the samples of ‖h‖ before the first step, after the first, …, after the last.
        gradients: of the norm of the loss's gradient in these states.
        stages: the stage of each step.
        steps: the residual steps.
    """

    count: int
    states: tuple[float, ...]
    gradients: tuple[float, ...]
    stages: tuple[int, ...]
    steps: tuple[StepSignal, ...]


def signal(view: ResidualDynamics, data: Data, *, loss: Loss = summed_cross_entropy, samples: int = 64) -> Signal:
    """Norms of states and gradients along ``view``, and what of the gradient goes through shortcut and branch.

    Args:
        data: pairs (x, labels); the first ``samples`` are used.
        loss: a sum over the samples, so that each has its own gradient.

    Raises:
        InvalidInput: for a network without residual steps.
    """
    stretches(view)
    batches = take(data, samples)
    forward, backward = [0.0] * (len(view.steps) + 1), [0.0] * (len(view.steps) + 1)
    ways: dict[int, _Ways] = {i: _Ways() for i, step in enumerate(view.steps) if step.has_choice}
    with differentiating(view):
        for x, labels in batches:
            states = states_of(view, x)
            v = cotangent(view, states[-1], lambda logits, labels=labels: loss(logits, labels))
            backward[-1] += _squares(v)
            for i in range(len(view.steps) - 1, -1, -1):
                v = _back(view.steps[i], states[i], v, ways.get(i))
                backward[i] += _squares(v)
            for i, h in enumerate(states):
                forward[i] += _squares(h)
    n = count(batches)
    return Signal(
        count=n,
        states=_roots(forward, n),
        gradients=_roots(backward, n),
        stages=tuple(step.stage for step in view.steps),
        steps=tuple(
            StepSignal(view.steps[i].label, view.steps[i].stage, i, *way.norms(n), way.cosine)
            for i, way in ways.items()
        ),
    )


class _Ways:
    """Sums over the samples of what came through the shortcut (a) and through the branch (b)."""

    def __init__(self) -> None:
        self.a = self.b = self.ab = 0.0

    def add(self, a: Tensor | None, b: Tensor | None) -> None:
        self.a += 0.0 if a is None else _squares(a)
        self.b += 0.0 if b is None else _squares(b)
        if a is not None and b is not None:
            self.ab += float((a.double() * b.double()).sum())

    def norms(self, n: int) -> tuple[float, float]:
        return math.sqrt(self.a / n), math.sqrt(self.b / n)

    @property
    def cosine(self) -> float:
        return self.ab / math.sqrt(self.a * self.b) if self.a * self.b > 0.0 else 0.0


def _back(step: Step, h: Tensor, v: Tensor, ways: _Ways | None) -> Tensor:
    """The cotangent before ``step``, from the one after it."""
    if ways is None:
        (pulled,) = Linear(step, h).pull([v])
        return h.new_zeros(h.shape) if pulled is None else pulled
    linear = GradedStep(step, h, "step")
    around, through = linear.route(v, through=False), linear.route(v, through=True)
    ways.add(around, through)
    parts = [part for part in (around, through) if part is not None]
    return sum(parts[1:], parts[0]) if parts else h.new_zeros(h.shape)


def _squares(h: Tensor) -> float:
    return float(h.double().square().sum())


def _roots(sums: Sequence[float], n: int) -> tuple[float, ...]:
    return tuple(math.sqrt(s / n) for s in sums)
