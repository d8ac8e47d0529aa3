"""95% intervals of means, by Student's t."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.special import stdtrit

from resode.errors import InvalidInput


@dataclass(frozen=True)
class Interval:
    """A mean over ``count`` seeds, and the ends of its 95% interval by Student's t."""

    mean: float
    low: float
    high: float
    count: int

    def within(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in [``low``, ``high``]."""
        return low <= self.low and self.high <= high


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval of independent ``values``.

    Raises:
        InvalidInput: for fewer than 2 values, which say nothing of their spread.
    """
    n, half = len(values), half_width(values)
    return Interval(mean(values), mean(values) - half, mean(values) + half, n)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of independent ``values``: t s/√n.

    Raises:
        InvalidInput: for fewer than 2 values.
    """
    n = len(values)
    if n < 2:
        raise InvalidInput(f"a 95% interval over {n} seed{'s' * (n != 1)}: give at least 2")
    return float(stdtrit(n - 1, 0.975)) * stdev(values) / n**0.5
