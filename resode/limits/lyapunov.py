"""Lyapunov exponents: how fast do neighbouring trajectories part?

J_L … J_1 is the derivative of the state after a stretch of L steps in the state before it. The QR method follows k
directions through it (Benettin et al. 1980; Dieci & Van Vleck 1995): from an orthonormal Q_0 on, J_l Q_{l−1} = Q_l R_l,
and the exponents are λ_i = (1/T) Σ_l log (R_l)_ii, over the time T that the stretch takes.

A stretch is short, so that the directions Q_0 matter, which an infinite one would forget. Sweeps choose them: an
orthonormal basis of J_1ᵀ … J_Lᵀ Q_L begins the next sweep. This is subspace iteration on JᵀJ: it converges to the
leading right singular vectors, for which J Q_0 = U Σ, and exp(T λ_i) is the i-th singular value of the derivative.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.blocks.settings import check_count
from resode.dynamics import ResidualDynamics
from resode.limits.record import Record
from resode.limits.samples import Data, take
from resode.limits.stretches import Stretch, stretches
from resode.paths.linear import Linear
from resode.paths.passes import differentiating, states_of

SWEEPS = 3


@dataclass(frozen=True)
class StretchLyapunov(Record):
    """The steps of one stage that keep its space.

    Args:
        stage: index of the stage.
        depth: L, the number of steps.
        duration: T: of a solver's steps the time they take; residual blocks take 1 together.
        exponents: λ_1 ≥ λ_2 ≥ …, the mean over the samples. Where a direction is lost altogether, the logarithm of the
            least normal number stands for that of 0.
        deviations: their standard deviations over the samples (0 for one sample).
    """

    stage: int
    depth: int
    duration: float
    exponents: tuple[float, ...]
    deviations: tuple[float, ...]


@dataclass(frozen=True)
class Lyapunov(Record):
    """A net on ``count`` samples, stretch by stretch."""

    count: int
    stretches: tuple[StretchLyapunov, ...]


def lyapunov(
    view: ResidualDynamics, data: Data, *, directions: int = 4, sweeps: int = SWEEPS, samples: int = 8, seed: int = 0
) -> Lyapunov:
    """The leading Lyapunov exponents of each stretch of ``view``, along the trajectories of some samples.

    Args:
        data: pairs (x, labels); the first ``samples`` are used.
        directions: how many exponents; no more than a state has entries.
        sweeps: of the choice of directions; 0 leaves them random. The i-th exponent is exact to about a factor
            (σ_{i+1}/σ_i)^(2·sweeps) of singular values.
        seed: of the first directions.

    Raises:
        InvalidInput: for a network without residual steps, or numbers below 1 (for sweeps: below 0).
    """
    check_count(directions, "directions")
    check_count(sweeps + 1, "sweeps + 1")
    found = stretches(view)
    x = torch.cat([x for x, _ in take(data, samples)])
    with differentiating(view):
        states = states_of(view, x)
        rates = [_rates(stretch, states, directions, sweeps, seed) for stretch in found]
    return Lyapunov(len(x), tuple(_of_stretch(s, r) for s, r in zip(found, rates, strict=True)))


def _of_stretch(stretch: Stretch, rates: Tensor) -> StretchLyapunov:
    columns = [sorted_rates.tolist() for sorted_rates in rates.sort(dim=1, descending=True).values.T]
    return StretchLyapunov(
        stage=stretch.stage,
        depth=stretch.depth,
        duration=stretch.duration,
        exponents=tuple(statistics.fmean(column) for column in columns),
        deviations=tuple(statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns),
    )


def _rates(stretch: Stretch, states: Sequence[Tensor], directions: int, sweeps: int, seed: int) -> Tensor:
    """λ for each sample and direction, (B, k)."""
    linears = [Linear(step, states[stretch.first + i]) for i, step in enumerate(stretch.steps)]
    h = states[stretch.first]
    size = h[0].numel()
    k = min(directions, size)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(h), size, k, generator=generator, dtype=torch.float64).to(h))
    for _ in range(sweeps):
        for linear in linears:
            Q, _ = _apply(linear.push, Q, h)
        for linear in reversed(linears):
            Q, _ = _apply(linear.pull, Q, h)
    logs = Q.new_zeros(len(h), k, dtype=torch.float64)
    least = math.log(torch.finfo(h.dtype).tiny)
    for linear in linears:
        Q, R = _apply(linear.push, Q, h)
        logs += R.diagonal(dim1=1, dim2=2).abs().double().log().clamp(min=least)
    return logs / stretch.duration


def _apply(map: object, Q: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of the images of the columns of ``Q``, (B, D, k), under a linear map of states."""
    images = map([column.reshape(h.shape) for column in Q.unbind(2)])
    columns = [torch.zeros_like(h) if image is None else image for image in images]
    return torch.linalg.qr(torch.stack([column.flatten(1) for column in columns], dim=2))
