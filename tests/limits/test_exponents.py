"""Exponents of powers of the depth, and their intervals over seeds."""

import math
from statistics import mean, stdev

import pytest
from scipy import stats

from resode import InvalidInput
from resode.intervals import Interval, interval
from resode.limits.exponents import Exponent, check_depths, fit_exponent

DEPTHS = (2, 4, 8, 16, 32)


def powers(exponents, depths=DEPTHS, factor=3.0):
    """factor·L^p, a seed for each p."""
    return {seed: {depth: factor * depth**p for depth in depths} for seed, p in enumerate(exponents)}


def test_exact_powers_have_their_exponents():
    found = fit_exponent(powers([-0.5, -0.5, -0.5]))
    assert (found.mean, found.low, found.high) == pytest.approx([-0.5] * 3)
    assert found.local == pytest.approx([-0.5] * 4)
    assert found.count == 3


def test_the_interval_is_students_over_seeds():
    slopes = [0.1, 0.4, -0.2, 0.3]
    found = fit_exponent(powers(slopes))
    low, high = stats.t.interval(0.95, 3, loc=mean(slopes), scale=stdev(slopes) / 2)
    assert (found.mean, found.low, found.high) == pytest.approx((mean(slopes), low, high))
    assert interval(slopes) == Interval(*(pytest.approx(x) for x in (mean(slopes), low, high)), 4)


def test_the_slope_is_the_least_squares_one_for_each_seed():
    depths = (3, 5, 10, 30, 100)
    found = {s: {L: math.exp(math.sin(s + L)) * L**0.7 for L in depths} for s in range(3)}
    slopes = [stats.linregress([math.log(L) for L in depths], [math.log(row[L]) for L in depths]).slope
              for row in found.values()]  # fmt: skip
    assert fit_exponent(found).mean == pytest.approx(mean(slopes))


def test_what_grows_faster_than_any_power_has_local_exponents_that_grow():
    found = fit_exponent({seed: {L: math.exp(0.1 * L) for L in DEPTHS} for seed in (0, 1)})
    assert list(found.local) == sorted(found.local)
    assert found.local == pytest.approx([0.1 * L / math.log(2) for L in DEPTHS[:-1]])


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_what_is_no_power_has_no_exponent(value):
    found = powers([1.0, 1.0])
    found[1][8] = value
    assert fit_exponent(found) is None


def test_an_interval_lies_within_bounds_when_all_of_it_does():
    assert Exponent(0.0, -0.2, 0.2, 3, ()).within(-0.2, 0.2)
    assert not Exponent(0.0, -0.2, 0.2, 3, ()).within(-0.1, 0.3)
    assert not Exponent(0.0, -0.2, 0.2, 3, ()).within(-0.3, 0.1)


@pytest.mark.parametrize(
    ("depths", "seeds", "says"),
    [
        ((), (0, 1), "at least 5"),
        ((1, 2, 4, 16), (0, 1), "at least 5"),
        ((1, 2, 4, 8, 15), (0, 1), "at least 16 times the smallest"),
        ((0, 2, 4, 8, 16), (0, 1), "each at least 1"),
        ((1, 2, 4, 8, 16, 16), (0, 1), "give each once"),
        ((1, 2, 4, 8, 16), (0,), "at least 2"),
        ((1, 2, 4, 8, 16), (0, 1, 1), "seeds are .* give each once"),
    ],
)
def test_too_few_depths_or_seeds_are_refused(depths, seeds, says):
    with pytest.raises(InvalidInput, match=says):
        check_depths(depths, seeds)


def test_the_least_that_will_do_is_accepted():
    check_depths((1, 2, 4, 8, 16), (0, 1))


def test_values_that_fit_no_exponent_are_refused():
    with pytest.raises(InvalidInput, match="at least 5"):
        fit_exponent({})
    with pytest.raises(InvalidInput, match="different depths"):
        fit_exponent({**powers([1.0]), 1: dict.fromkeys((2, 4, 8, 16, 64), 1.0)})
    with pytest.raises(InvalidInput, match="sizes, of at least 0"):
        fit_exponent(powers([1.0, 1.0], factor=-1.0))
    with pytest.raises(InvalidInput, match="over 1 seed:"):
        interval([1.0])
