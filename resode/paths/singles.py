"""The gradients of single paths: sampled as Veit et al. 2016 do, or all of them.

A path chooses, at each step that leaves the choice, the branch or the way round it; its gradient is the product of the
Jacobians along it, vᵀ ∏_l P_l (S_l or J_l). The graphs of all steps are made once and kept, which takes the memory of
an ordinary backward pass, and every path is one way through them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from resode.dynamics import ResidualDynamics
from resode.errors import InvalidInput
from resode.paths import lengths
from resode.paths.graded import GradedStep
from resode.paths.linear import Linear
from resode.paths.passes import Loss, cotangent, differentiating, input_of, require_state

MOST_CHOICES = 16
"""Residual steps of a network whose paths :func:`paths` goes through one by one, at most."""

Choices = tuple[bool, ...]
"""Of each step that leaves the choice, from the first to the last: whether the path goes through its branch."""


@dataclass(frozen=True)
class Sampled:
    """What sampled single paths say of each length (Veit et al. 2016, section 4.3 and figure 6).

    Args:
        counts: the number of paths of length 0, 1, ….
        drawn: how many of them were sampled: all, where there are no more than that.
        norms: the mean norm of a path's gradient, over the paths drawn and the samples of the batch; 0 where there is
            no path.
        errors: the standard errors of these means, for the draw of the paths; 0 where all paths were drawn.
    """

    counts: tuple[int, ...]
    drawn: tuple[int, ...]
    norms: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def totals(self) -> tuple[float, ...]:
        """The number of paths times the mean norm of their gradients: Veit's gradient magnitude of each length."""
        return lengths.magnitudes(self.counts, self.norms)

    @property
    def total_errors(self) -> tuple[float, ...]:
        """The standard errors of the totals."""
        return lengths.magnitudes(self.counts, self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "counts": list(self.counts),
            "drawn": list(self.drawn),
            "norms": list(self.norms),
            "errors": list(self.errors),
            "totals": list(self.totals),
            "total_errors": list(self.total_errors),
        }


def sampled(view: ResidualDynamics, x: Tensor, loss: Loss, samples: int = 16, seed: int = 0) -> Sampled:
    """Norms of the gradients in ``x`` of single paths, ``samples`` of each length, drawn uniformly.

    The draws are independent; where a length has no more than ``samples`` paths, each of them is taken once. They
    depend on ``seed`` alone, and leave the global random state as it is. A solver's step counts as one branch.

    Raises:
        InvalidInput: for fewer than 2 samples, from which no error could be told; and as ``spectrum.gradient`` does.
    """
    check_samples(samples)
    x = input_of(view, x, None)
    counts, random = lengths.counts(view), Random(seed)
    fixed, choices = sum(step.is_counted for step in view.steps), sum(step.has_choice for step in view.steps)
    drawn, norms, errors = [], [], []
    with differentiating(view):
        routes = _Routes(view, x, loss)
        for length, count in enumerate(counts):
            found = [routes.norm(path) for path in _draw(random, choices, length - fixed, samples)] if count else []
            drawn.append(len(found))
            norms.append(fmean(found) if found else 0.0)
            errors.append(stdev(found) / sqrt(samples) if count > samples else 0.0)
    return Sampled(counts, tuple(drawn), tuple(norms), tuple(errors))


def check_samples(samples: int) -> None:
    """Refuse so few samples of each length that they have no error.

    Raises:
        InvalidInput: for fewer than 2.
    """
    if samples < 2:
        raise InvalidInput(f"samples is {samples}: at least 2 paths of each length are needed to tell an error")


def paths(view: ResidualDynamics, x: Tensor, loss: Loss) -> Iterator[tuple[Choices, Tensor]]:
    """The gradient in ``x`` of every single path, with the choices that make it: 2^n of them at n residual steps.

    They sum to the gradient. What paths share from the output on is computed once: 2^(n + 1) products for all.

    Raises:
        InvalidInput: for more than 16 steps that leave a choice; and as ``spectrum.gradient`` does.
    """
    x = input_of(view, x, None)
    choices = sum(step.has_choice for step in view.steps)
    if choices > MOST_CHOICES:
        raise InvalidInput(
            f"{choices} residual steps make 2^{choices} paths: at most {MOST_CHOICES} steps can be gone through path "
            "by path; use spectrum.gradient for the exact sum over the paths of each length, or spectrum.sampled"
        )
    with differentiating(view):
        routes = _Routes(view, x, loss)
    return routes.all()


class _Routes:
    """The ways back through a network, from the cotangent of its last state to the gradient in ``x``."""

    def __init__(self, view: ResidualDynamics, x: Tensor, loss: Loss) -> None:
        self.x, self.stem = x, Linear(view.stem, x)
        h = require_state(self.stem.value, "the stem")
        self.steps: list[GradedStep] = []
        for step in view.steps:
            self.steps.append(GradedStep(step, h, "step"))
            h = require_state(self.steps[-1].value, f"step {step.label!r}")
        self.v = cotangent(view, h, loss)

    def norm(self, choices: Choices) -> float:
        """The norm of one path's gradient, as the mean over the samples."""
        v: Tensor | None = self.v
        rest = list(choices)
        for step in reversed(self.steps):
            v = step.route(v, rest.pop() if step.has_choice else step.is_counted)
            if v is None:
                return 0.0
        return float(
            torch.linalg.vector_norm(self._at_x(v).reshape(len(self.x), -1), dim=1, dtype=torch.float64).mean()
        )

    def all(self) -> Iterator[tuple[Choices, Tensor]]:
        """Every path's choices and gradient."""
        return self._ahead(len(self.steps), self.v, ())

    def _ahead(self, place: int, v: Tensor | None, chosen: Choices) -> Iterator[tuple[Choices, Tensor]]:
        """The paths that have made the choices ``chosen`` at the steps from ``place`` on."""
        if place == 0:
            yield chosen, self._at_x(v)
            return
        step = self.steps[place - 1]
        for through in (False, True) if step.has_choice else (step.is_counted,):
            ahead = None if v is None else step.route(v, through)
            yield from self._ahead(place - 1, ahead, (through, *chosen) if step.has_choice else chosen)

    def _at_x(self, v: Tensor | None) -> Tensor:
        (gradient,) = self.stem.pull([v])
        return torch.zeros_like(self.x) if gradient is None else gradient


def _draw(random: Random, steps: int, through: int, samples: int) -> Sequence[Choices]:
    """Paths that go through the branches of so many of the ``steps``."""
    if comb(steps, through) <= samples:
        taken = [set(places) for places in combinations(range(steps), through)]
    else:
        taken = [set(random.sample(range(steps), through)) for _ in range(samples)]
    return [tuple(step in places for step in range(steps)) for places in taken]
