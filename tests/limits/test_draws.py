"""Weights over depth have the covariance that is claimed, and are made again as they were."""

import math

import pytest
import torch

from resode import Branch, InvalidInput, Stack
from resode.limits.draws import DepthDraws, smooth_features, smooth_terms, standard_draws

KINDS = ("iid", "smooth", "tied")


def weights_of(branch):
    return [layer.weight.detach().clone() for layer in branch.layers if hasattr(layer, "weight")]


def drawn(kind, size=20_000, depth=10, seed=0, length_scale=0.2):
    """θ(l/L) of every block, of shape (depth, size)."""
    draw = standard_draws(kind, size, depth, seed, length_scale)
    return torch.stack([draw(index) for index in range(depth)])


@pytest.mark.parametrize("length_scale", [0.02, 0.05, 0.2, 1.0, 10.0])
def test_the_features_of_the_smooth_process_have_its_covariance_to_rounding(length_scale):
    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    terms = smooth_terms(length_scale)
    features = torch.stack([smooth_features(float(t), length_scale, terms) for t in times])
    covariance = torch.exp(-((times[:, None] - times[None]) ** 2) / (2 * length_scale**2))
    torch.testing.assert_close(features @ features.T, covariance, rtol=0, atol=1e-12)


def test_no_fewer_terms_would_do():
    for length_scale in (0.05, 0.2, 1.0):
        few = smooth_terms(length_scale) // 2
        assert 1 - float(smooth_features(0.0, length_scale, few).square().sum()) > 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_claimed_covariance_over_depth(kind):
    theta = drawn(kind)
    steps = torch.arange(10, dtype=torch.float64) / 10
    claimed = {
        "iid": torch.eye(10, dtype=torch.float64),
        "smooth": torch.exp(-((steps[:, None] - steps[None]) ** 2) / (2 * 0.2**2)),
        "tied": torch.ones(10, 10, dtype=torch.float64),
    }[kind]
    n = theta.shape[1]
    # The variance of a product of two standard normals is at most 2: five standard errors.
    torch.testing.assert_close(theta @ theta.T / n, claimed, rtol=0, atol=5 * math.sqrt(2 / n))
    assert theta.mean(1).abs().max() < 5 / math.sqrt(n)


def test_the_smooth_process_is_one_function_of_t_at_every_depth():
    coarse, fine = drawn("smooth", 50, depth=5), drawn("smooth", 50, depth=20)
    torch.testing.assert_close(fine[::4], coarse, rtol=0, atol=1e-12)


def test_the_first_independent_blocks_are_those_of_any_depth():
    assert torch.equal(drawn("iid", 50, depth=20)[:5], drawn("iid", 50, depth=5))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_from_their_seed_alone_in_any_order(kind):
    torch.manual_seed(5)
    first = standard_draws(kind, 30, 8, 3, 0.2)
    torch.manual_seed(6)
    again = standard_draws(kind, 30, 8, 3, 0.2)
    before = torch.get_rng_state()
    for index in (7, 0, 3, 7):
        assert torch.equal(first(index), again(index))
    assert not torch.equal(first(0), standard_draws(kind, 30, 8, 4, 0.2)(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "stack", "expected"),
    [
        ("mlp", Stack(norm="none"), [1 / 8, 2 / 32]),
        ("mlp", Stack(norm="batch", activation="tanh"), [1 / 8, 1 / 32]),
        ("preact", Stack(norm="none"), [2 / 72, 2 / 72]),
        ("basic", Stack(norm="none"), [1 / 72, 2 / 72]),
    ],
)
def test_a_block_gets_weights_by_fan_in_and_by_what_stands_before(kind, stack, expected):
    branch = Branch(8, stack, kind)
    draws = DepthDraws(branch, 200)
    layers = [layer for layer in branch.layers if getattr(layer, "weight", torch.empty(0)).ndim > 1]
    squares = [0.0] * len(layers)
    for index in range(200):
        draws.load(branch, index)
        for i, layer in enumerate(layers):
            squares[i] += float(layer.weight.detach().double().square().mean()) / 200
            assert layer.bias is None or not layer.bias.any()
    assert squares == pytest.approx(expected, rel=0.05)


def test_loading_leaves_norms_alone_and_gives_each_block_its_own_weights():
    branch = Branch(8, Stack(norm="group"), "preact")
    norm = branch.layers[0]
    torch.nn.init.constant_(norm.weight, 3.0)
    draws, other = DepthDraws(branch, 4, "smooth"), Branch(8, Stack(norm="group"), "preact")
    draws.load(branch, 1)
    first = weights_of(branch)
    draws.load(branch, 2)
    assert not torch.equal(weights_of(branch)[1], first[1])
    draws.load(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(other)[1:], first[1:], strict=True) if a.ndim > 1)
    assert torch.equal(norm.weight, torch.full((8,), 3.0))
    assert branch.layers[2].weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "smoth"}, "unknown course of weights over depth 'smoth': choose from iid, smooth, tied"),
        ({"depth": 0}, "depth is 0: a whole number"),
        ({"depth": 2.5}, "depth is 2.5: a whole number"),
        ({"kind": "smooth", "length_scale": 0.01}, "length_scale is 0.01, below 0.02"),
        ({"kind": "smooth", "length_scale": -1.0}, "length_scale is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        DepthDraws(Branch(4, kind="mlp"), **{"depth": 3, **settings})


def test_a_block_that_is_not_there_is_refused():
    branch = Branch(4, kind="mlp")
    for index in (-1, 3):
        with pytest.raises(InvalidInput, match=f"block {index} of 3: .* from 0 to 2"):
            DepthDraws(branch, 3).load(branch, index)
