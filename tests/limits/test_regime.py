"""Exponents in depth: smooth weights at 1/L, independent ones at 1/√L, and no others, have a limit."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from resode import InvalidInput, ResidualBlock, dynamics
from resode.limits.regime import Fit, Regime, regime
from resode.limits.regularity import regularity

C, DEPTHS, SEEDS = 32, (4, 8, 16, 32, 64), range(3)


class Layer(nn.Module):
    """f(h) = W h."""

    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, t, h):
        return h @ self.W.T


def draw(generator):
    return torch.randn(C, C, dtype=torch.float64, generator=generator) / math.sqrt(C)


def independent(depth, generator):
    return [draw(generator) for _ in range(depth)]


def smooth(depth, generator):
    A, B = draw(generator), draw(generator)
    return [A * math.cos(2 * i / depth) + B * math.sin(3 * i / depth) for i in range(depth)]


def brownian(depth, generator):
    steps = [draw(generator)] + [draw(generator) / math.sqrt(depth) for _ in range(depth - 1)]
    return [sum(steps[: i + 1]) for i in range(depth)]


def found_of(weights, beta):
    def net_of(depth, seed):
        generator = torch.Generator().manual_seed(100 * seed + depth)
        Ws = weights(depth, torch.Generator().manual_seed(seed) if weights is smooth else generator)
        return nn.Sequential(*(ResidualBlock(Layer(W), scale=depth**-beta) for W in Ws))

    generator = torch.Generator().manual_seed(1)
    batch = [(torch.randn(16, C, dtype=torch.float64, generator=generator), torch.zeros(16, dtype=torch.int64))]
    return {s: {L: regularity(dynamics(net_of(L, s)), batch) for L in DEPTHS} for s in SEEDS}


def one(weights, beta):
    (stretch,) = regime(found_of(weights, beta)).stretches
    assert stretch.depths == DEPTHS
    return stretch


def exponents(stretch, *quantities):
    return [stretch.fit(quantity).mean for quantity in quantities]


# For E W Wᵀ = 1 a branch is as long as the state, to some 1/√(C·L): tolerances of 0.1 are many deviations of a slope.


def test_independent_weights_at_one_over_root_depth_are_diffusive():
    """‖Δh‖/‖h‖ = L^(−1/2): a way of length √L, a quadratic variation and a displacement of order 1."""
    stretch = one(independent, 0.5)
    assert stretch.regime == "diffusive"
    assert stretch.fit("relative_increment").near(-0.5)
    found = exponents(stretch, "relative_increment", "roughness", "coherence")
    assert found == pytest.approx([-0.5, 0.0, -0.5], abs=0.1)
    # E‖h_L‖² = (1 + 1/L)^L ‖h_0‖² → e: the displacement's limit is √(e − 1), and at L = 4 it is 8% less.
    assert stretch.fit("displacement").mean == pytest.approx(0.0, abs=0.1)
    last = stretch.fit("displacement").values[0][-1]
    assert last == pytest.approx(math.sqrt(C * (math.e - 1)), rel=0.2)


def test_independent_weights_at_one_over_depth_leave_the_identity():
    """‖h_L − h_0‖ ≈ L^(−1)·√L."""
    stretch = one(independent, 1.0)
    assert stretch.regime == "neither"
    assert stretch.fit("displacement").mean == pytest.approx(-0.5, abs=0.1)
    assert stretch.fit("displacement").high < -0.25


def test_independent_weights_without_a_factor_explode():
    """log‖h_L‖² ≈ L log 2, whose slope over log L grows from depth to depth: no power."""
    stretch = one(independent, 0.0)
    assert stretch.regime == "neither"
    local = stretch.fit("displacement").local
    assert all(b > 1.5 * a for a, b in pairwise(local))
    growth = math.log(stretch.fit("displacement").values[0][-1] / stretch.fit("displacement").values[0][-2])
    assert growth == pytest.approx(0.5 * 32 * math.log(2), rel=0.15)


def test_smooth_weights_at_one_over_depth_are_smooth():
    stretch = one(smooth, 1.0)
    assert stretch.regime == "smooth"
    found = exponents(stretch, "relative_increment", "roughness", "length", "quadratic", "displacement")
    assert found == pytest.approx([-1.0, -1.0, 0.0, -0.5, 0.0], abs=0.1)


def test_weights_as_rough_as_brownian_motion_are_neither():
    stretch = one(brownian, 1.0)
    assert stretch.regime == "neither"
    assert stretch.fit("roughness").mean == pytest.approx(-0.5, abs=0.12)
    assert stretch.fit("relative_increment").mean == pytest.approx(-1.0, abs=0.12)


def test_equal_weights_are_smooth_and_have_no_exponent_of_roughness():
    def tied(depth, generator):
        return [draw(torch.Generator().manual_seed(7))] * depth

    stretch = one(tied, 1.0)
    assert stretch.regime == "smooth"
    assert stretch.fit("roughness") is None
    assert "all the same" in stretch.words


def test_an_exponent_is_near_another_where_its_interval_says_so():
    def fit(low, high):
        return Fit("q", (low + high) / 2, low, high, 3, (), ())

    assert fit(-0.6, -0.4).near(-0.5) is True
    assert fit(-0.8, -0.4).near(-0.5) is None
    assert fit(-1.2, -0.8).near(-0.5) is False


def test_a_regime_survives_json():
    found = regime(found_of(independent, 0.5))
    assert Regime.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_too_few_depths_and_nets_of_different_stages_are_refused():
    found = found_of(independent, 0.5)
    with pytest.raises(InvalidInput, match="depths are"):
        regime({seed: {L: row[L] for L in (4, 8)} for seed, row in found.items()})
    other = regularity(
        dynamics(nn.Sequential(ResidualBlock(Layer(torch.eye(4))), nn.ReLU(), ResidualBlock(Layer(torch.eye(4))))),
        [(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))],
    )
    with pytest.raises(InvalidInput, match="stages of residual steps"):
        regime({0: {**found[0], 64: other}, 1: found[1]})
