"""Power laws in depth: the exponent p of a quantity that goes like L^p, with its uncertainty over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log
from statistics import linear_regression, mean

from resode.errors import InvalidInput
from resode.intervals import Interval, interval

LEAST_DEPTHS, LEAST_SPAN = 5, 16
"""An exponent is fitted over at least so many depths, the largest at least so many times the smallest."""


@dataclass(frozen=True)
class Exponent(Interval):
    """p of a quantity that goes like L^p: the slope of its logarithm over log L, by least squares for each seed.

    ``local`` are the mean slopes from each depth to the next. For a power law they are all the same; where they grow,
    the quantity grows faster than any power, and p is but its mean over these depths.
    """

    local: tuple[float, ...]


def check_depths(depths: Sequence[int], seeds: Sequence[int]) -> None:
    """Check that an exponent with an interval can be fitted over these.

    Raises:
        InvalidInput: for fewer than 5 depths, a span below 16, a depth below 1, fewer than 2 seeds, or any twice.
    """
    if min(depths, default=0) < 1 or len(set(depths)) < LEAST_DEPTHS or max(depths) < LEAST_SPAN * min(depths):
        raise InvalidInput(
            f"depths are {tuple(depths)}: an exponent needs at least {LEAST_DEPTHS}, each at least 1, the largest at "
            f"least {LEAST_SPAN} times the smallest"
        )
    if len(set(seeds)) < 2:
        raise InvalidInput(f"seeds are {tuple(seeds)}: a 95% interval needs at least 2")
    for name, values in (("depths", depths), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise InvalidInput(f"{name} are {tuple(values)}: give each once")


def fit_exponent(found: Mapping[int, Mapping[int, float]]) -> Exponent | None:
    """The exponent of values by seed and depth; None where a value is 0 or not finite, and follows no power of L.

    Args:
        found: values by depth, by seed; every seed with the same depths.

    Raises:
        InvalidInput: as :func:`check_depths`; for seeds of different depths, or a value below 0.
    """
    rows = list(found.values())
    depths = sorted(rows[0]) if rows else []
    check_depths(depths, list(found))
    if any(sorted(row) != depths for row in rows):
        raise InvalidInput(f"seeds were measured at different depths: {[sorted(row) for row in rows]}")
    values = [row[depth] for row in rows for depth in depths]
    if any(value < 0 for value in values):
        raise InvalidInput(f"{min(values)} goes like no power of L: sizes, of at least 0, are expected")
    if not all(0 < value < inf for value in values):
        return None
    x = [log(depth) for depth in depths]
    curves = [[log(row[depth]) for depth in depths] for row in rows]
    over_seeds = interval([linear_regression(x, y).slope for y in curves])
    steps = [b - a for a, b in pairwise(x)]
    middle = [mean(column) for column in zip(*curves, strict=True)]
    local = tuple((b - a) / step for (a, b), step in zip(pairwise(middle), steps, strict=True))
    return Exponent(over_seeds.mean, over_seeds.low, over_seeds.high, over_seeds.count, local)
