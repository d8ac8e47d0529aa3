"""How many paths have which length, and which lengths carry the gradient.

At each of n residual blocks a path goes round the branch or through it, so that C(n, k) of the 2^n paths go through k
branches, and the length of a path drawn at random is binomial (Veit, Wilber & Belongie 2016, arXiv 1605.06431, section
4.3). A plain layer lies on every path and makes it one longer: p of them shift the distribution by p.

A step of a Runge–Kutta method is counted as one branch, or by the evaluations of f that a path goes through in it: then
a path chooses a chain of stages i_1 < … < i_k, along which no coefficient a or b of the tableau is 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import accumulate
from math import inf
from sys import float_info
from typing import Any

from resode.blocks.tableaux import Tableau
from resode.dynamics import Increment, ResidualDynamics, Step
from resode.errors import InvalidInput, choose
from resode.paths.graded import GRADES, Grade

Counts = tuple[int, ...]
"""The number of paths of length 0, 1, …"""


def counts(steps: ResidualDynamics | Iterable[Step], grade: Grade = "step") -> Counts:
    """The number of paths through the ``steps``, of each length from 0 to the longest.

    Args:
        grade: what a solver's step adds to the length of a path: "step" (one, unless the path goes round it) or
            "evaluation" (the evaluations of f that it goes through).
    """
    return counts_from_each(steps, grade)[0]


def counts_from_each(steps: ResidualDynamics | Iterable[Step], grade: Grade = "step") -> tuple[Counts, ...]:
    """:func:`counts` of the paths from each state on: from that before the first step, …, from that after the last."""
    choose(grade, GRADES, "grade")
    found: list[Counts] = [(1,)]
    for step in reversed(steps.steps if isinstance(steps, ResidualDynamics) else tuple(steps)):
        found.append(_product(_of_step(step, grade), found[-1]))
    return tuple(reversed(found))


def distribution(counts: Sequence[int]) -> tuple[float, ...]:
    """The share of all paths that has each length."""
    total = sum(counts)
    return tuple(float(Fraction(count, total)) for count in counts)


def share_between(counts: Sequence[int], first: int, last: int) -> float:
    """The share of all paths with a length from ``first`` to ``last``, both included."""
    return float(Fraction(sum(counts[max(first, 0) : last + 1]), sum(counts)))


def magnitudes(counts: Sequence[int], norms: Sequence[float]) -> tuple[float, ...]:
    """Number of paths × mean norm of one path's gradient, for each length (Veit et al. 2016, figure 6c).

    The number is exact: 2^2000 paths are no obstacle, where their gradients are small in proportion.
    """
    return tuple(_times(count, norm) for count, norm in zip(counts, norms, strict=True))


@dataclass(frozen=True)
class Effective:
    """The lengths ``first`` to ``last``, which carry ``share`` of the magnitude and are ``paths`` of all paths."""

    first: int
    last: int
    share: float
    paths: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def effective(magnitudes: Sequence[float], counts: Sequence[int], share: float = 0.95) -> Effective:
    """The shortest run of lengths that carries at least ``share`` of the summed gradient magnitude.

    Of several that are as short, the one that carries most. Veit et al. 2016 find that lengths of 5 to 17 of 54 carry
    almost all of it, and that these are 0.45 % of all paths: which is P(5 ≤ Bin(54, 1/2) ≤ 17), whatever the network.

    Args:
        magnitudes: of each length 0, 1, …: the norms of exact parts, or those of sampled paths times their number
            (``Spectrum.norms``, ``Sampled.totals``); where long paths were left out, fewer than ``counts``.
        counts: the number of paths of each length.
        share: above 0, at most 1.

    Raises:
        InvalidInput: for another ``share``, magnitudes that are not finite or negative or all 0, or more of them than
            counts.
    """
    exact = [Fraction(value) for value in _checked(magnitudes, counts, share)]
    before = [Fraction(0), *accumulate(exact)]
    needed = Fraction(str(float(share))) * before[-1]  # 0.8 is meant as 4/5, not as the double next to it
    runs = []
    last = 0
    for first in range(len(exact)):
        last = max(last, first)
        while last < len(exact) and before[last + 1] - before[first] < needed:
            last += 1
        if last == len(exact):
            break
        runs.append((last - first, -(before[last + 1] - before[first]), first, last))
    _, carried, first, last = min(runs)
    return Effective(first, last, float(-carried / before[-1]), share_between(counts, first, last))


def chains(tableau: Tableau) -> Counts:
    """The number of ways through one step of a Runge–Kutta method that go through 0, 1, … evaluations of f."""
    stages = tableau.solution_stages
    through: list[Counts] = []  # the ways from stage i to the end of the step, of i = s, …, 1
    for i in reversed(range(stages)):
        ways: Counts = (1,) if tableau.b[i] != 0.0 else (0,)
        for j, later in zip(reversed(range(i + 1, stages)), through, strict=True):
            if tableau.a[j][i] != 0.0:
                ways = _sum(ways, (0, *later))
        through.append(ways)
    found: Counts = (1,)
    for ways in through:
        found = _sum(found, (0, *ways))
    return found


def _of_step(step: Step, grade: Grade) -> Counts:
    if step.is_counted:
        return 0, 1
    if not step.has_choice:
        return (1,)
    if grade == "evaluation" and isinstance(step.branch, Increment):
        return chains(step.branch.tableau)
    return 1, 1


def _checked(magnitudes: Sequence[float], counts: Sequence[int], share: float) -> list[float]:
    values = [float(value) for value in magnitudes]
    check_share(share)
    if len(values) > len(counts):
        raise InvalidInput(f"{len(values)} magnitudes for the {len(counts)} lengths of paths that are counted")
    if not all(0.0 <= value < inf for value in values):
        raise InvalidInput(f"magnitudes {values}: finite numbers of at least 0 are expected")
    if not any(values):
        raise InvalidInput("all magnitudes are 0: no length carries a share of nothing")
    return values


def check_share(share: float) -> None:
    """Refuse what is no share of a magnitude to be carried.

    Raises:
        InvalidInput: outside of (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise InvalidInput(f"share is {share!r}: the part of the magnitude to carry must lie in (0, 1]")


def _times(count: int, norm: float) -> float:
    product = Fraction(float(norm)) * count
    return float(product) if product <= float_info.max else inf


def _sum(a: Counts, b: Counts) -> Counts:
    longest = max(len(a), len(b))
    return tuple((a[k] if k < len(a) else 0) + (b[k] if k < len(b) else 0) for k in range(longest))


def _product(a: Counts, b: Counts) -> Counts:
    found = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y
    return tuple(found)
