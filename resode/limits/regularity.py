"""Regularity in depth: do weights and states change little from step to step?

A residual net of depth L is an Euler scheme of an ODE if its weights are those of a smooth function, W_l ≈ θ(l/L): then
‖W_{l+1} − W_l‖ and the increments of the state fall as 1/L. Weights that are independent from step to step make
increments that add up as a random walk: the state changes by a finite amount only if each is of size 1/√L, and the
limit is a stochastic differential equation (Cohen et al. 2021, arXiv 2105.12245; Marion et al. 2022, arXiv 2206.06929).
One net tells how rough it is; exponents take nets of several depths (``limits.regime``).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from resode.dynamics import Increment, ResidualDynamics
from resode.layers.context import evaluate
from resode.layers.factors import refuse_factorized
from resode.limits.record import Record
from resode.limits.samples import Batches, Data, count, take
from resode.limits.stretches import Stretch, stretches
from resode.limits.weights import Weights, difference, norm, norm_of_sum, theta, tracing, weights_of

SUBDIVISIONS = 8
"""Of each solver's step, for the total variation of θ(t)."""


@dataclass(frozen=True)
class StretchRegularity(Record):
    """The residual steps of one stage that keep its space, L = ``depth`` of them.

    Norms of states are root mean squares over the samples; W_l is the vector of all parameters that branch l depends on
    (of those that vary with t, in a solver's step or a block, θ(t_l)).

    Args:
        stage: index of the stage.
        depth: L.
        states: ‖h_0‖ … ‖h_L‖.
        increments: ‖scale·f_l(h_l)‖ for each l.
        displacement: ‖h_L − h_0‖.
        weights: ‖W_l‖ for each l; None where the branches have no parameters, or not all have the same.
        differences: ‖W_{l+1} − W_l‖, L − 1 of them; None as ``weights``.
        sum: ‖Σ_l W_l‖; None as ``weights``.
        variation: total variation of the weights in depth, Σ_l ‖W_{l+1} − W_l‖, and for a solver's steps that of θ(t)
            from the first to the last; None as ``weights``.
    """

    stage: int
    depth: int
    states: tuple[float, ...]
    increments: tuple[float, ...]
    displacement: float
    weights: tuple[float, ...] | None
    differences: tuple[float, ...] | None
    sum: float | None
    variation: float | None

    @property
    def length(self) -> float:
        """Σ_l ‖scale·f_l(h_l)‖: finite as L → ∞ for a flow, of order √L for a random walk."""
        return math.fsum(self.increments)

    @property
    def quadratic(self) -> float:
        """(Σ_l ‖scale·f_l(h_l)‖²)^½, the quadratic variation: of order 1/√L for a flow, finite for a random walk."""
        return math.sqrt(math.fsum(i * i for i in self.increments))

    @property
    def relative_increment(self) -> float:
        """The mean of ‖scale·f_l(h_l)‖/‖h_l‖: of order 1/L for a flow, 1/√L for a random walk."""
        return _mean([i / h if h > 0.0 else math.nan for i, h in zip(self.increments, self.states, strict=False)])

    @property
    def straightness(self) -> float | None:
        """‖h_L − h_0‖ over the length of the way; None without any way."""
        return self.displacement / self.length if self.length > 0.0 else None

    @property
    def roughness(self) -> float | None:
        """The root mean square of ‖W_{l+1} − W_l‖ over that of ‖W_l‖: of order 1/L for smooth weights, √2 for
        independent ones of mean zero; None where there is none."""
        if not self.differences or not any(self.weights):
            return None
        return _root_mean_square(self.differences) / _root_mean_square(self.weights)

    @property
    def coherence(self) -> float | None:
        """‖Σ_l W_l‖/Σ_l ‖W_l‖: 1 for weights that are all the same, of order 1/√L for independent ones of mean zero."""
        return None if not self.weights or not any(self.weights) else self.sum / math.fsum(self.weights)


@dataclass(frozen=True)
class Regularity(Record):
    """A net on ``count`` samples, stretch by stretch."""

    count: int
    stretches: tuple[StretchRegularity, ...]


def regularity(view: ResidualDynamics, data: Data, *, samples: int = 64) -> Regularity:
    """How weights and states of ``view`` change from step to step, stretch by stretch.

    Args:
        data: pairs (x, labels); the first ``samples`` are used.

    Raises:
        InvalidInput: for a network without residual steps, and for one whose weights are products of factors.
    """
    if view.model is not None:
        refuse_factorized(view.model, "their regularity in depth")
    batches = take(data, samples)
    found = stretches(view)
    with view.evaluation():
        sums = [_Sums(stretch) for stretch in found]
        for x, _ in batches:
            states = list(view.states(x))
            for each in sums:
                each.add(states)
        with tracing(view):
            weights = [_weights(stretch, view, batches) for stretch in found]
    n = count(batches)
    return Regularity(n, tuple(_of_stretch(s, w, n) for s, w in zip(sums, weights, strict=True)))


class _Sums:
    """Sums of squares over the samples, for one stretch."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch
        self.states = [0.0] * (stretch.depth + 1)
        self.increments = [0.0] * stretch.depth
        self.displacement = 0.0

    def add(self, states: Sequence[Tensor]) -> None:
        here = states[self.stretch.first : self.stretch.last + 1]
        for i, h in enumerate(here):
            self.states[i] += _squares(h)
        for i, (step, h) in enumerate(zip(self.stretch.steps, here, strict=False)):
            self.increments[i] += _squares(step.scale * evaluate(step.branch, step.t, h))
        self.displacement += _squares(here[-1] - here[0])


def _of_stretch(sums: _Sums, weights: Sequence[Weights] | None, n: int) -> StretchRegularity:
    norms = differences = total = variation = None
    if weights is not None:
        norms = tuple(norm(w) for w in weights)
        differences = tuple(difference(b, a) for a, b in pairwise(weights))
        total = norm_of_sum(weights)
        # One after the other: all of them at once would take SUBDIVISIONS times the memory of the steps' own.
        variation = math.fsum(difference(b, a) for a, b in pairwise(_course(sums.stretch, weights)))
    return StretchRegularity(
        stage=sums.stretch.stage,
        depth=sums.stretch.depth,
        states=tuple(math.sqrt(s / n) for s in sums.states),
        increments=tuple(math.sqrt(s / n) for s in sums.increments),
        displacement=math.sqrt(sums.displacement / n),
        weights=norms,
        differences=differences,
        sum=total,
        variation=variation,
    )


def _weights(stretch: Stretch, view: ResidualDynamics, batches: Batches) -> list[Weights] | None:
    """W_0 … W_{L−1}; None where they are no vectors of one space."""
    h = view.run(view.stem(batches[0][0][:2]), 0, stretch.first)
    found = []
    for step in stretch.steps:
        found.append(weights_of(step, h))
        h = step(h)
    shapes = {tuple(w.shape for w in weights) for weights in found}
    return found if len(shapes) == 1 and shapes != {()} else None


def _course(stretch: Stretch, weights: Sequence[Weights]) -> Iterator[Weights]:
    """The weights along the way: those of blocks, and θ(t) within each step of a solver and at the end of a solve."""
    for step, after, own in zip(stretch.steps, (*stretch.steps[1:], None), weights, strict=True):
        if not isinstance(step.branch, Increment):
            yield own
            continue
        field = step.branch.field
        for k in range(SUBDIVISIONS):
            yield theta(field, step.t + (step.end - step.t) * k / SUBDIVISIONS)
        if after is None or getattr(after.branch, "field", None) is not field or after.t != step.end:
            yield theta(field, step.end)


def _squares(h: Tensor) -> float:
    return float(h.double().square().sum())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(_mean([v * v for v in values]))
