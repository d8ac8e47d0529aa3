"""The trainer beside a plain loop: the interval of a difference, and the same training on both sides."""

import pytest

from experiments.bench.plain_loop import PADDING
from experiments.loop_parity import APART, CONFIGS, Config, difference
from resode import InvalidInput


def test_the_interval_of_a_difference_is_welchs():
    # Two samples of n = 3 with the variance 1: a standard error of √(2/3), 4 degrees of freedom, t = 2.776445.
    found = difference([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], margin=6.0)
    half = 2.776445 * (2 / 3) ** 0.5
    assert found["mean"] == pytest.approx(-3.0)
    assert (found["low"], found["high"]) == pytest.approx((-3.0 - half, -3.0 + half), rel=1e-6)
    assert found["within"] is True
    # With variances of 1 and 4 they are Satterthwaite's: (1/3 + 4/3)²/((1/3)²/2 + (4/3)²/2) = 50/17.
    found = difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], margin=6.0)
    assert found["high"] - found["mean"] == pytest.approx(3.21876 * (5 / 3) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("margin", "within"), [(5.3, True), (5.2, False)])
def test_the_whole_interval_must_lie_within_the_margin(margin, within):
    # −3 ± 2.2670: its lower end decides.
    assert difference([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], margin)["within"] is within
    assert difference([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], margin)["within"] is within


def test_both_ways_crop_and_mirror_alike_and_share_no_seed():
    for config in CONFIGS.values():
        setup = config.setup(0)
        assert (setup.stack.augment.flip, setup.stack.augment.crop) == (True, PADDING)
        assert setup.data.validation == 0.0
        assert max(config.seeds) < APART


@pytest.mark.parametrize(("settings", "says"), [({"seeds": (0,)}, "at least two"), ({"margin": 0.0}, "margin is 0.0")])
def test_a_comparison_that_says_nothing_is_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Config(**settings)
