"""Variance of branch over shortcut: closed forms, and what norms make of it at initialization."""

import json
import math
import statistics

import pytest
import torch
from linear_flows import D, data, inputs, matrix, net_of, points, product, rate
from torch import nn

from resode import Branch, InvalidInput, NetConfig, ResidualBlock, Stack, build, dynamics, recalibrate
from resode.limits.identity_bias import IdentityBias, identity_bias


def test_a_linear_flow_by_hand():
    """The branch of an Euler step is Δ a(t) A h."""
    A = matrix()
    found = identity_bias(dynamics(net_of("euler", 4)), data())
    assert (found.count, len(found.steps)) == (7, 4)
    for i, step in enumerate(found.steps):
        h = inputs() @ product(A, points(4)[: i + 1]).T
        branch = rate(i / 4) / 4 * h @ A.T
        expected = float(branch.var(correction=0)), float(h.var(correction=0))
        assert (step.branch, step.shortcut) == pytest.approx(expected)
        assert step.ratio == pytest.approx(expected[0] / expected[1])
        assert step.share == pytest.approx(expected[0] / sum(expected))
        assert (step.position, step.stage) == (i + 1, 0)


def test_positions_count_from_the_entry_of_a_stage_and_a_change_of_shape_has_none():
    config = NetConfig(net="resnet", depth=20, width=4, channels=2, size=(8, 8))
    x = torch.rand(4, 2, 8, 8)
    found = identity_bias(dynamics(build(config, seed=0)), [(x, torch.zeros(4, dtype=torch.int64))])
    assert [step.position for step in found.steps] == [1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert [step.stage for step in found.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


WIDTH, DEPTH, SIZE = 64, 16, 8
INSIDE = (1 - 2 / (3 * SIZE)) ** 2
"""The mean share of a 3 × 3 window that lies in an image: what lies beyond is 0, and adds nothing to the variance."""


def initialized(norm, scale=1.0, seed=0):
    """One stage of pre-activation blocks with He-normal weights, as a training would meet it, and its data."""
    torch.manual_seed(seed)
    blocks = [ResidualBlock(Branch(WIDTH, Stack(norm=norm), "preact"), scale=scale) for _ in range(DEPTH)]
    net = nn.Sequential(*blocks)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    batch = [(torch.randn(32, WIDTH, SIZE, SIZE), torch.zeros(32, dtype=torch.int64))]
    recalibrate(net, batch)
    return dynamics(net, batch[0][0][:2]), batch


@pytest.mark.parametrize("seed", range(3))
def test_batch_norm_makes_the_branchs_share_fall_as_one_over_the_depth(seed):
    """Every branch gives the same variance v, and the shortcut v₀ + (l − 1)·v at block l.

    A branch's v varies by some tenth at 64 channels, and so does the ratio at each block.
    """
    view, batch = initialized("batch", seed=seed)
    steps = identity_bias(view, batch).steps
    v = statistics.fmean(step.branch for step in steps)
    assert v == pytest.approx(INSIDE, rel=0.1)
    law = [1 / (step.position - 1 + steps[0].shortcut / v) for step in steps]
    assert [step.ratio / r for step, r in zip(steps, law, strict=True)] == pytest.approx([1.0] * DEPTH, abs=0.3)
    logs = [[math.log(r) for r in each] for each in (law, [step.ratio for step in steps])]
    assert statistics.linear_regression(*logs).slope == pytest.approx(1.0, abs=0.12)
    assert steps[-1].share == pytest.approx(1 / (DEPTH + steps[0].shortcut / v), rel=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_without_norm_the_branchs_variance_is_the_shortcuts(seed):
    """He's weights keep E h² but for what lies beyond the border; the channels of a deep net are not alike, so that the
    ratio varies from block to block by a half, and its mean by an eighth."""
    view, batch = initialized("none", seed=seed)
    steps = identity_bias(view, batch).steps
    middle = math.exp(statistics.fmean(math.log(step.ratio) for step in steps))
    assert middle == pytest.approx(INSIDE**2, rel=0.25)
    growth = math.log(steps[-1].shortcut / steps[0].shortcut) / (DEPTH - 1)
    assert growth == pytest.approx(math.log(1 + INSIDE**2), rel=0.2)


def test_skipinit_begins_at_the_identity():
    view, batch = initialized("none", scale="skipinit")
    steps = identity_bias(view, batch).steps
    assert all(step.ratio == step.share == 0.0 for step in steps)


def test_a_step_without_any_variance_has_no_share():
    net = nn.Sequential(ResidualBlock(Branch(D, Stack(norm="none"), "mlp"), scale=0.0))
    (step,) = identity_bias(dynamics(net), [(torch.ones(3, D), torch.zeros(3, dtype=torch.int64))]).steps
    assert step.shortcut == 0.0
    assert step.share != step.share


def test_batches_make_the_variance_of_all_samples():
    net = net_of("euler", 2)
    x = torch.cat([x + 10 * i for i, (x, _) in enumerate(data())])
    whole = [(x, torch.zeros(7, dtype=torch.int64))]
    parts = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split([3, 1, 3])]
    a, b = (identity_bias(dynamics(net), each).steps[1] for each in (whole, parts))
    assert (a.branch, a.shortcut) == pytest.approx((b.branch, b.shortcut), rel=1e-12)


def test_a_plain_net_is_refused_and_a_bias_survives_json():
    with pytest.raises(InvalidInput, match="no step of the network is residual"):
        identity_bias(dynamics(build(NetConfig(net="plain", depth=8, width=4, channels=2, size=(8, 8)))), data())
    found = identity_bias(dynamics(net_of()), data())
    assert IdentityBias.from_dict(json.loads(json.dumps(found.to_dict()))) == found
