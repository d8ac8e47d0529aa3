"""Identity bias: how much of a block's output does its branch make, and how much its shortcut?

With batch norm, a branch at initialization gives a variance that does not depend on the depth, while that of the
shortcut grows by it from block to block: the branch's share falls as 1/l, and the net begins near the identity. Without
norm the branch's variance is about the shortcut's, and both double from block to block. SkipInit begins at the identity
itself (De & Smith 2020, arXiv 2002.10444).
"""

import math
from dataclasses import dataclass

from torch import Tensor

from resode.dynamics import ResidualDynamics
from resode.layers.context import evaluate
from resode.limits.record import Record
from resode.limits.samples import Data, count, take
from resode.limits.stretches import stretches


@dataclass(frozen=True)
class StepBias(Record):
    """One residual step.

    Args:
        label: the step's.
        stage: index of its stage.
        position: 1, 2, …: its place in the stretch of steps that keep the space, counted from the entry; 0 for a step
            that changes it.
        branch, shortcut: variance of scale·f(h), and of shortcut(h), over all entries of all samples.
    """

    label: str
    stage: int
    position: int
    branch: float
    shortcut: float

    @property
    def ratio(self) -> float:
        """Variance of the branch over variance of the shortcut."""
        return self.branch / self.shortcut if self.shortcut > 0.0 else math.inf

    @property
    def share(self) -> float:
        """Variance of the branch over the sum of both."""
        return self.branch / (self.branch + self.shortcut) if self.branch + self.shortcut > 0.0 else math.nan


@dataclass(frozen=True)
class IdentityBias(Record):
    """A net on ``count`` samples, by residual step."""

    count: int
    steps: tuple[StepBias, ...]


def identity_bias(view: ResidualDynamics, data: Data, *, samples: int = 64) -> IdentityBias:
    """The variances of branch and shortcut at each residual step of ``view``, in evaluation mode.

    A batch norm is what its running statistics make of it. Those of a net that was not trained know nothing of any
    data: recalibrate it first (``resode.recalibrate``), to see it as training does.

    Args:
        data: pairs (x, labels); the first ``samples`` are used.

    Raises:
        InvalidInput: for a network without residual steps.
    """
    batches = take(data, samples)
    positions = {s.first + i: i + 1 for s in stretches(view) for i in range(s.depth)}
    places = [i for i, step in enumerate(view.steps) if step.has_choice]
    branches, shortcuts = {i: _Moments() for i in places}, {i: _Moments() for i in places}
    with view.evaluation():
        for x, _ in batches:
            h = view.stem(x)
            for i, step in enumerate(view.steps):
                if i in branches:
                    branches[i].add(step.scale * evaluate(step.branch, step.t, h))
                    shortcuts[i].add(step.shortcut(h))
                h = step(h)
    return IdentityBias(
        count(batches),
        tuple(
            StepBias(
                label=view.steps[i].label,
                stage=view.steps[i].stage,
                position=positions.get(i, 0),
                branch=branches[i].variance,
                shortcut=shortcuts[i].variance,
            )
            for i in places
        ),
    )


class _Moments:
    """Mean and variance of all numbers added so far (Chan, Golub & LeVeque 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, h: Tensor) -> None:
        values = h.double()
        n, mean = values.numel(), float(values.mean())
        off, total = mean - self.mean, self.n + n
        self.squares += float((values - mean).square().sum()) + off * off * self.n * n / total
        self.n, self.mean = total, self.mean + off * n / total

    @property
    def variance(self) -> float:
        return self.squares / self.n
