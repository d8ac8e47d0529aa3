"""Counts, times and functions of t on a grid of 1/r of the spacing, or r times it.

A function of t is held by rows: the values of its pieces (basis "constant"), at its knots ("linear"), or its
coefficients ("fourier"). Tensors that belong to it scale like a power p of its gradient, which for a row with the
weight w_k = ∫ φ_k dt is w_k times a density: on equal pieces w = Δ; at knots w = Δ inside and Δ/2 at the two ends. So
such rows are resampled as densities, row/w^p, which for p = 0 are the values themselves.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from resode.errors import InvalidInput


class Finer:
    """On a grid of 1/``factor`` of the spacing."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def count(self, n: int, what: str) -> int:
        """Of ``n`` intervals."""
        return self.factor * n

    def times(self, times: Sequence[float]) -> list[float]:
        """``times``, and between any two of them factor − 1 others, evenly spaced."""
        between = (a + (b - a) * (j / self.factor) for a, b in pairwise(times) for j in range(self.factor))
        return [*between, times[-1]]

    def rows(self, rows: Tensor, kind: str, power: int) -> Tensor:
        """``rows`` of a function on a basis of this ``kind``, which scale like this ``power`` of its gradient."""
        r = self.factor
        if kind == "constant":
            return rows.repeat_interleave(r, 0) * r**-power
        if kind == "fourier" or len(rows) == 1:
            return rows
        density = rows / _ends(rows) ** power
        share = torch.arange(r, dtype=rows.dtype, device=rows.device).view(1, r, *(1 for _ in rows.shape[1:])) / r
        between = torch.lerp(density[:-1].unsqueeze(1), density[1:].unsqueeze(1), share).flatten(0, 1)
        fine = torch.cat([between, density[-1:]])
        return fine * _ends(fine) ** power * r**-power


class Coarser:
    """On a grid of ``factor`` times the spacing."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def count(self, n: int, what: str) -> int:
        """Of ``n`` intervals.

        Raises:
            InvalidInput: when ``factor`` does not divide them.
        """
        if n % self.factor:
            raise InvalidInput(
                f"{n} {what} cannot be made {self.factor} times fewer: a multiple of {self.factor} is expected"
            )
        return n // self.factor

    def times(self, times: Sequence[float]) -> list[float]:
        """The first of ``times`` and every ``factor``-th after it, the last one among them.

        Raises:
            InvalidInput: when it is not.
        """
        self.count(len(times) - 1, "intervals between the knots of running statistics")
        return list(times[:: self.factor])

    def rows(self, rows: Tensor, kind: str, power: int) -> Tensor:
        """As :meth:`Finer.rows`. Of pieces, the means; of knots, those that stay."""
        r = self.factor
        if kind == "constant":
            return mean(rows.view(len(rows) // r, r, *rows.shape[1:]).unbind(1)) * r**power
        if kind == "fourier" or len(rows) == 1:
            return rows
        return rows[::r] * r**power


def _ends(rows: Tensor) -> Tensor:
    """½ for the first and the last of ``rows``, and 1 for those between."""
    weights = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
    weights[[0, -1]] = 0.5
    return weights.view(-1, *(1 for _ in rows.shape[1:]))


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of ``values``; of equal ones, that value to the last bit."""
    first, *others = values
    return first + sum((other - first for other in others), torch.zeros_like(first)) / len(values)
