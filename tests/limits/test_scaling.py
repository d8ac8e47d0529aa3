"""Residual stages at initialization: what theory says of them as their depth grows."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import mean, stdev

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resode import InvalidInput
from resode.limits import ScalingTable, scaling
from resode.limits.draws import DepthDraws, normal
from resode.limits.exponents import Exponent
from resode.limits.scaling import Growth, measure, tabulate, verdict
from resode.limits.stages import DrawnStage, Stage
from resode.runs import jsonable

DEPTHS = (4, 8, 16, 32, 64)
SHALLOW = (2, 4, 8, 16, 32)
SEEDS = (0, 1, 2)


def stage(beta, weights="iid", norm="none", **settings):
    return Stage(**{"beta": beta, "weights": weights, "norm": norm, "channels": 32, "batch": 8, **settings})


def exponent(table, name="change"):
    return table.exponents[name]


# What a stage computes


def by_hand(settings, depth, seed, h):
    """The states of an mlp stage without a norm, by matrices."""
    branch = settings.branch()
    draws = DepthDraws(branch, depth, settings.weights, seed, settings.length_scale)
    states = [h]
    for index in range(depth):
        draws.load(branch, index)
        first, second = branch.layers[0].weight.detach(), branch.layers[2].weight.detach()
        h = h + depth**-settings.beta * F.relu(h @ first.T) @ second.T
        states.append(h)
    return states


@pytest.mark.parametrize("weights", ["iid", "smooth", "tied"])
def test_the_states_are_those_of_the_blocks_run_by_hand(weights):
    settings = stage(0.5, weights)
    h = normal(settings.shape, 9, 0)
    for ours, theirs in zip(DrawnStage(settings, 6, 2).states(h), by_hand(settings, 6, 2, h), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [stage(0.5), stage(0.0, "smooth", "batch"), stage(1.0, "tied", "group")])
def test_cotangents_are_those_of_one_graph_through_all_blocks(settings):
    drawn = DrawnStage(settings, 5, 1)
    h = normal(settings.shape, 9, 0)
    g = normal(settings.shape, 9, 1)
    *_, pulled = drawn.pull_back(list(drawn.states(h)), g)
    # Every block a module of its own, all in one graph.
    blocks = nn.Sequential(*(DrawnStage(settings, 5, 1).block(index) for index in range(5)))
    x = h.clone().requires_grad_()
    blocks(x).backward(g)
    torch.testing.assert_close(pulled, x.grad, rtol=1e-10, atol=1e-10)
    assert sum(1 for _ in drawn.pull_back(list(drawn.states(h)), g)) == 6


def test_a_growth_holds_the_ratios_of_states_and_gradients():
    settings = stage(0.5, norm="batch")
    found = measure(settings, 4, 3)
    h, g = normal((2, *settings.shape), 3, 0)
    drawn = DrawnStage(settings, 4, 3)
    states = list(drawn.states(h))
    *_, pulled = drawn.pull_back(states, g)
    assert found == Growth(
        4,
        3,
        pytest.approx(float((states[-1] - h).norm() / h.norm())),
        pytest.approx(float(states[-1].norm() / h.norm())),
        pytest.approx(float(pulled.norm() / g.norm())),
        pytest.approx(float((pulled - g).norm() / g.norm())),
    )


def test_the_input_is_not_what_the_weights_are_made_of():
    """With few numbers in all, a stream used twice would show."""
    settings = stage(0.5, "tied", channels=4, batch=4)
    branch = settings.branch()
    DepthDraws(branch, 3, "tied", 0).load(branch, 0)
    h, g = normal((2, *settings.shape), 0, 0)
    drawn = 2 * branch.layers[0].weight.detach().flatten()  # of variance 1
    for other in (h, g):
        assert not torch.isclose(drawn[:, None], other.flatten()[None], rtol=0, atol=1e-9).any()


def test_measurements_come_from_their_seed_alone():
    settings = stage(0.5, "smooth", "batch")
    torch.manual_seed(1)
    first = measure(settings, 8, 0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert measure(settings, 8, 0) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert measure(settings, 8, 1).change != first.change


def test_a_deep_stage_holds_the_weights_of_one_block():
    drawn = DrawnStage(stage(0.5), 1000)
    assert drawn.block(0) is drawn.block(999)
    assert sum(p.numel() for p in drawn.block(0).parameters()) == 2 * 32 * 32 + 2 * 32


# What theory says of it


@pytest.mark.parametrize(("beta", "depth"), [(0.0, 4), (0.5, 8), (0.5, 32), (1.0, 16)])
def test_independent_weights_change_the_state_by_a_known_mean_square(beta, depth):
    """E‖f(h)‖² = ‖h‖² and E f(h) = 0 give E‖h_L − h_0‖² = ((1 + L^(−2β))^L − 1) ‖h_0‖²."""
    squares = [measure(stage(beta, batch=1), depth, seed).change ** 2 for seed in range(60)]
    expected = (1 + depth ** (-2 * beta)) ** depth - 1
    assert abs(mean(squares) - expected) < 4 * stdev(squares) / math.sqrt(60)
    assert stdev(squares) / math.sqrt(60) < 0.2 * expected, "or the test above would say nothing"


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.0, "explosion"), (0.5, "non-trivial limit"), (0.8, "identity"), (1.0, "identity")]
)
def test_independent_weights_without_a_norm_have_a_limit_at_one_over_the_root_of_depth_alone(beta, expected):
    table = scaling(stage(beta), DEPTHS, SEEDS)
    assert table.verdict == table.gradient_verdict == expected
    if beta >= 0.5:
        for name in ("change", "gradient_change"):
            assert exponent(table, name).mean == pytest.approx(0.5 - beta, abs=0.1)
    else:
        # 2^(L/2): each doubling of L doubles the local exponent, to (L/2) at L.
        assert exponent(table, "state").local[-1] == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize("weights", ["smooth", "tied"])
@pytest.mark.parametrize(("beta", "expected"), [(0.0, "explosion"), (0.5, "explosion"), (1.0, "non-trivial limit")])
def test_weights_smooth_in_depth_have_a_limit_at_one_over_depth_alone(weights, beta, expected):
    table = scaling(stage(beta, weights), DEPTHS, SEEDS)
    assert table.verdict == table.gradient_verdict == expected
    if beta == 1.0:
        assert exponent(table).mean == pytest.approx(0.0, abs=0.05)
    else:
        assert exponent(table).local[-1] > 1.5 * exponent(table).mean, "faster than any power"


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("weights", "least"), [("iid", 0.5), ("smooth", 1.0), ("tied", 1.0)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_with_a_norm_states_grow_as_a_power(norm, weights, least, beta):
    """‖f‖ is the same at every state: L terms of size L^(−β) add up, as a random walk or as like terms."""
    table = scaling(stage(beta, weights, norm), SHALLOW, SEEDS)
    p = least - beta
    assert exponent(table).mean == pytest.approx(p, abs=0.1)
    assert table.verdict == ("explosion" if p > 0 else "identity" if p < 0 else "non-trivial limit")


def test_a_branch_normalized_at_its_entry_has_a_share_of_the_variance_as_one_over_the_block():
    """Batch norm gives the branch of block l the variance v at every state, so that the state has 1 + l·v before it."""
    settings = stage(0.0, norm="batch", kind="preact", channels=8, side=4, batch=32)
    shares = []
    for seed in range(4):
        states = list(DrawnStage(settings, 24, seed).states(normal(settings.shape, seed, 0)))
        branches = [float((b - a).var()) for a, b in pairwise(states)]
        shares.append([branch / float(h.var()) for branch, h in zip(branches, states, strict=False)])
    share = torch.tensor(shares).mean(0)
    v = share[0]
    # 1/share = 1/v + l, a line of slope 1 in l; the norms see batches, not expectations.
    line = torch.stack([torch.ones(24), torch.arange(24.0)], 1)
    offset, slope = torch.linalg.lstsq(line, 1 / share).solution
    assert float(slope) == pytest.approx(1.0, abs=0.15)
    assert float(offset) == pytest.approx(float(1 / v), abs=1.0)


def test_batch_norm_lets_gradients_grow_as_a_power_that_the_mean_of_a_relu_gives():
    """Block l multiplies ‖g‖² by 1 + 1/(variance over the batch), which grows by 1 − 1/π with each block."""
    for depth in (8, 32):
        squares = [measure(stage(0.0, norm="batch", batch=64), depth, seed).gradient ** 2 for seed in range(6)]
        expected = math.prod(1 + 1 / (1 + (1 - 1 / math.pi) * index) for index in range(depth))
        # Widths and batches are finite, and sums of ReLUs not quite Gaussian.
        assert mean(squares) == pytest.approx(expected, rel=0.2)
        assert mean(squares) > 1.4 * (1 + depth), "what it would be if the variance grew by 1, as the square does"


@pytest.mark.parametrize(("beta", "p"), [(0.0, 0.5), (0.5, 0.0), (1.0, -0.5)])
def test_convolutions_scale_as_vectors_do(beta, p):
    table = scaling(stage(beta, norm="batch", kind="preact", channels=6, side=4), SHALLOW, SEEDS)
    assert exponent(table).mean == pytest.approx(p, abs=0.1)


@pytest.mark.parametrize("weights", ["iid", "tied"])
def test_skipinit_begins_as_the_identity_at_any_depth(weights):
    table = scaling(stage("skipinit", weights), DEPTHS, SEEDS)
    assert table.verdict == table.gradient_verdict == "identity"
    assert exponent(table) is None
    assert exponent(table, "state").mean == 0.0
    assert all((g.change, g.state, g.gradient, g.gradient_change) == (0, 1, 1, 0) for g in table.growths)


def test_smooth_weights_at_one_over_depth_converge_to_the_flow_at_first_order():
    """The flow of dh/dt = f(θ(t), h), by midpoint steps on a grid whose middles are points of the process, too."""
    settings = stage(1.0, "smooth", channels=8, activation="tanh")
    h = start = normal(settings.shape, 4, 0)
    steps, branch = 400, settings.branch()
    draws = DepthDraws(branch, 2 * steps, "smooth", 4, settings.length_scale)
    with torch.no_grad():
        for i in range(steps):
            draws.load(branch, 2 * i)
            half = h + branch(0.0, h) / (2 * steps)
            draws.load(branch, 2 * i + 1)
            h = h + branch(0.0, half) / steps
    errors = []
    for depth in (32, 64, 128):
        *_, end = DrawnStage(settings, depth, 4).states(start)
        errors.append(float((end - h).norm() / h.norm()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1.0, 1.0], abs=0.1)


def test_a_stage_beyond_the_largest_number_is_an_explosion():
    settings = stage(0.0, "tied", batch=1)
    beyond = measure(settings, 1200, 0)
    assert beyond.change == beyond.state == beyond.gradient == math.inf
    growths = [measure(settings, depth, seed) for depth in SHALLOW for seed in (0, 1)]
    table = tabulate(settings, [*growths, beyond, replace(beyond, seed=1)])
    assert exponent(table) is None
    assert table.verdict == table.gradient_verdict == "explosion"
    assert ScalingTable.from_dict(json.loads(json.dumps(jsonable(table.to_dict())))) == table


# Verdicts and tables


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.26, 0.4, "explosion"),
        (0.24, 0.4, "undecided"),
        (-0.2, 0.2, "non-trivial limit"),
        (-0.3, 0.2, "undecided"),
        (-0.6, -0.26, "identity"),
        (-0.6, -0.24, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side_of_the_lines(low, high, says):
    assert verdict(Exponent((low + high) / 2, low, high, 3, ()), [1.0]) == says


def test_verdicts_without_an_exponent():
    assert verdict(None, [0.0, 0.0]) == "identity"
    assert verdict(None, [1.0, math.inf]) == "explosion"
    assert verdict(None, [0.0, 1.0]) == "undecided"


def test_a_table_is_made_of_what_was_measured_and_survives_json():
    for settings in (stage(0.5), stage("skipinit"), stage(0.0, channels=4)):
        growths = [measure(settings, depth, seed) for depth in SHALLOW for seed in (0, 1)]
        table = tabulate(settings, growths)
        assert table == replace(scaling(settings, SHALLOW, (0, 1), progress=True), growths=table.growths)
        assert ScalingTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_what_json_has_no_number_for_was_infinite():
    held = {**asdict(measure(stage(0.5), 2, 0)), "state": None}
    assert Growth.from_dict(held).state == math.inf


# Refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": "skip"}, "unknown beta .* 'skip': choose from skipinit"),
        ({"beta": -0.5}, "beta is -0.5"),
        ({"beta": math.nan}, "beta is nan"),
        ({"weights": "smoth"}, "unknown course of weights"),
        ({"norm": "bacth"}, "unknown norm 'bacth'"),
        ({"kind": "conv"}, "unknown branch kind 'conv'"),
        ({"norm": "instance"}, "acts on vectors"),
        ({"activation": "relux"}, "unknown activation"),
        ({"channels": 0}, "channels is 0"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"expansion": -1.0}, "expansion is -1.0"),
        ({"length_scale": 0.001}, "length_scale is 0.001"),
        ({"norm": "batch", "batch": 1}, "batch norm averages over a batch"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Stage(**settings)


def test_batch_norm_of_one_image_has_its_pixels_to_average_over():
    assert measure(stage(0.5, norm="batch", kind="preact", channels=4, batch=1), 2, 0).change > 0


def test_too_few_depths_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(DrawnStage, "__init__", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(InvalidInput, match="at least 5"):
        scaling(stage(0.5), (8, 16), SEEDS)
    with pytest.raises(InvalidInput, match="at least 2"):
        scaling(stage(0.5), DEPTHS, (0,))


def test_a_depth_that_is_none_is_refused():
    with pytest.raises(InvalidInput, match="depth is 0"):
        measure(stage(0.5), 0, 0)
