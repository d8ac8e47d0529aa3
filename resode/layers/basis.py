"""Bases of functions of time, on which weights vary over depth: θ(t) = Σ_k φ_k(t) Θ_k, for k = 0 … K − 1.

With s = (t − t0)/(t1 − t0), clamped to [0, 1]:

========  =========================================================  ================================================
basis     φ_k                                                        θ
========  =========================================================  ================================================
constant  1 for k/K ≤ s < (k + 1)/K, else 0                          constant on K equal pieces: K blocks of a
                                                                     residual net (Queiruga et al. 2020, 2008.02389)
linear    max(0, 1 − abs(s(K − 1) − k))                               linear between the values at K equidistant knots
fourier   φ_0 = 1, φ_k = √2 cos(πks)                                 smooth; a spectral basis as in Massaroli et al.
                                                                     2020, arXiv 2002.08071
========  =========================================================  ================================================

The first two are partitions of unity; for K = 1 each is the constant. The third is the Fourier series of θ continued as
an even function to [−1, 1], so that θ(t0) and θ(t1) are free to differ. It has no sines: with them the functions, of
period 2 on an interval of length 1, are nearly dependent (the condition of their Gram matrix is 4e5 at K = 9 and 4e11
at K = 17), while the cosines are orthonormal.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.errors import InvalidInput, choose
from resode.layers.norm import hat_weights

BASES = ("constant", "linear", "fourier")
PIECES = 4
"""Pieces of weights that vary with t, where nothing suggests their number."""


@dataclass(frozen=True)
class Basis:
    """``knots`` functions φ_k on [``t0``, ``t1``], constant beyond it.

    Args:
        kind: "constant", "linear" or "fourier".
        knots: K, the number of functions.
        t0, t1: ends of the interval.

    Raises:
        InvalidInput: for an unknown kind, fewer than 1 knot, or t1 ≤ t0.
    """

    kind: str
    knots: int
    t0: float = 0.0
    t1: float = 1.0

    def __post_init__(self) -> None:
        choose(self.kind, BASES, "basis")
        if not isinstance(self.knots, int) or self.knots < 1:
            raise InvalidInput(f"knots is {self.knots!r}: a whole number of at least 1 is expected")
        if not -math.inf < self.t0 < self.t1 < math.inf:
            raise InvalidInput(f"a basis from t0 = {self.t0:g} to t1 = {self.t1:g}: t1 must be the larger, both finite")

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times inside (t0, t1) where the φ_k are not smooth: ends of pieces (constant), knots (linear), or none."""
        pieces = {"constant": self.knots, "linear": self.knots - 1, "fourier": 1}[self.kind]
        return tuple(self.t0 + (self.t1 - self.t0) * (i / pieces) for i in range(1, pieces))

    def terms(self, t: float) -> list[tuple[int, float]]:
        """The k with φ_k(t) ≠ 0, and φ_k(t): one or two (constant, linear), or all (fourier).

        A time that misses a breakpoint by the rounding of t0 + (t1 − t0)·(i/K) is on it.
        """
        s = min(max((t - self.t0) / (self.t1 - self.t0), 0.0), 1.0)
        if self.kind == "constant":
            return [(min(int(s * self.knots + _slack(torch.float64, self.knots)), self.knots - 1), 1.0)]
        if self.kind == "linear":
            return hat_weights(s * (self.knots - 1), range(self.knots))
        return [(k, math.sqrt(2.0) * math.cos(math.pi * k * s) if k else 1.0) for k in range(self.knots)]

    def values(self, t: Tensor) -> Tensor:
        """φ_0(t) … φ_{K−1}(t), of shape (K,), for a ``t`` of no dimension whose value is not asked for."""
        s = ((t - self.t0) / (self.t1 - self.t0)).clamp(0.0, 1.0)
        k = torch.arange(self.knots, dtype=s.dtype, device=s.device)
        if self.kind == "constant":
            piece = torch.floor(s * self.knots + _slack(s.dtype, self.knots)).clamp(max=self.knots - 1)
            return (k == piece).to(s.dtype)
        if self.kind == "linear":
            return (1.0 - (s * (self.knots - 1) - k).abs()).clamp(min=0.0)
        return torch.where(k > 0, math.sqrt(2.0) * torch.cos(math.pi * k * s), 1.0)


def knots_of(kind: str, pieces: int = PIECES) -> int:
    """The number K of values of a basis with ``pieces`` pieces: one more if it is linear, else as many."""
    return pieces + (kind == "linear")


def _slack(dtype: torch.dtype, knots: int) -> float:
    """Share of a piece by which a time of this type may miss the piece's end and still count as on it."""
    return max(1e-9, 4.0 * knots * torch.finfo(dtype).eps)
