"""Recalibration: batch norms take the averages over the data, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from resode import Branch, Dropout, InvalidInput, NetConfig, ODEBlock, ResidualBlock, Stack, build, recalibrate
from resode.blocks import solver_settings
from resode.layers import BatchNorm


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(*sizes, shape=(3, 6, 6)):
    """Batches whose means and spreads differ."""
    return [(1.0 + i) * randn(n, *shape, seed=i) + i for i, n in enumerate(sizes)]


def statistics(model):
    """Mean, variance and count of every batch norm, one after the other."""
    return [
        buffer.clone()
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    ]


def moments(x):
    """Mean and unbiased variance of each channel."""
    x = x.transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm])
@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8), (8, 8, 3)])
def test_the_statistics_are_the_averages_over_the_batches_by_their_samples(norm, sizes):
    model, data = nn.Sequential(norm(3)), batches(*sizes)
    model(randn(4, 3, 6, 6, seed=9))  # statistics of before, which must not count
    assert recalibrate(model, data) == 1
    shares = [n / sum(sizes) for n in sizes]
    for i, held in enumerate((model[0].running_mean, model[0].running_var)):
        expected = sum(share * moments(x)[i] for share, x in zip(shares, data, strict=True))
        torch.testing.assert_close(held, expected)
    assert model[0].num_batches_tracked == len(sizes)


def test_a_second_norm_sees_what_the_first_makes_of_each_batch():
    """Normalized by the moments of the batch, as in training, and not by the running ones."""
    model, data = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), batches(8, 8)
    assert recalibrate(model, data) == 2
    seen = [nn.functional.batch_norm(x, None, None, training=True).relu() for x in data]
    torch.testing.assert_close(model[2].running_mean, sum(moments(x)[0] for x in seen) / 2)


def test_a_layer_that_is_used_twice_takes_the_average_of_all_its_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(x)
            return self.norm(3.0 * x + 1.0)

    model, data = Twice(), batches(8, 4)
    recalibrate(model, data)
    means = [0.5 * (moments(x)[0] + moments(3.0 * x + 1.0)[0]) for x in data]
    torch.testing.assert_close(model.norm.running_mean, (8 * means[0] + 4 * means[1]) / 12)


def test_each_knot_takes_the_average_of_the_moments_met_there():
    """In one step of Euler's the branch meets x itself; the later knots meet what its steps make of x."""
    torch.manual_seed(0)
    block = ODEBlock(Branch(4, Stack(), "preact"), "euler", steps=3)
    first, data = next(m for m in block.modules() if isinstance(m, BatchNorm)), batches(8, 8, 4, shape=(4, 5, 5))
    assert first.running_mean.shape == (4, 4)
    recalibrate(block, data)
    expected = torch.zeros(3, 4)
    for x in data:
        twin = copy.deepcopy(block).train()
        with torch.no_grad():
            states = [x, *twin.trajectory(x, [1 / 3, 2 / 3])]
        expected += torch.stack([moments(h)[0] for h in states]) * len(x) / 20
    torch.testing.assert_close(first.running_mean[:3], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.running_mean[3], first.running_mean[2]), "Euler's method never looks at the end"
    assert first.num_batches_tracked.tolist() == [3, 3, 3, 3]


def test_a_knot_that_nothing_came_by_keeps_its_statistics():
    torch.manual_seed(0)
    branch = Branch(4, Stack(), "preact")
    layers = [m for m in branch.modules() if isinstance(m, BatchNorm)]
    for layer in layers:
        layer.set_knots((0.0, 0.5, 1.0))
        layer.running_mean.fill_(7.0)
        layer.num_batches_tracked.fill_(5)
    recalibrate(ResidualBlock(branch, t=0.5), batches(8, 8, shape=(4, 5, 5)))
    for layer in layers:
        assert layer.running_mean[::2].eq(7.0).all()
        assert not layer.running_mean[1].eq(7.0).any()
        assert layer.num_batches_tracked.tolist() == [5, 2, 5]


NETS = {
    "residual": {"net": "resnet", "depth": 14},
    "tied": {"net": "resnet", "depth": 14, "tied": True},
    "ODE": {"net": "odenet", "solver": "midpoint", "steps": 2},
    "steered": {"net": "odenet", "solver": "bosh3", "steer": 0.4},
    "vgg": {"net": "vgg", "blocks": 2, "convs": 1},
}


def small(name, **stack):
    return build(NetConfig(width=4, channels=3, size=(8, 8), classes=3, stack=Stack(**stack), **NETS[name]), 0)


DATA = batches(8, 8, 5, shape=(3, 8, 8))


@pytest.mark.parametrize("name", NETS)
def test_it_depends_on_nothing_but_weights_and_data_and_draws_nothing(name):
    """Dropout is off, so that a second time, from other statistics and another random state, gives the same."""
    model = small(name, norm="batch", dropout=Dropout(p=0.5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    recalibrate(model, DATA)
    assert torch.equal(torch.get_rng_state(), state)
    found = statistics(model)
    torch.manual_seed(2)
    model.train()(DATA[0])
    recalibrate(model, DATA)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), found, strict=True))
    recalibrate(model, DATA)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), found, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_for_one_batch_evaluation_is_then_training_without_dropout(name):
    model, x = small(name), DATA[0]
    recalibrate(model, [x])
    with torch.no_grad():
        evaluated = model.eval()(x)
        for layer in model.modules():
            if isinstance(layer, BatchNorm):
                layer.train()
        trained = model(x)
    # The running variance is the unbiased one, the batch's own the biased: 1/n apart. Between knots moments vary.
    assert float((evaluated - trained).norm() / trained.norm()) < 0.2


def test_modes_momenta_weights_and_gradients_are_left_as_they_were():
    model = small("ODE", dropout=Dropout(p=0.5))
    model.stages[1].eval()
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    layers[0].momentum, layers[1].momentum = None, 0.3
    modes, momenta = [m.training for m in model.modules()], [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked for layer in layers]
    weights = [p.clone() for p in model.parameters()]
    recalibrate(model, DATA)
    assert [m.training for m in model.modules()] == modes
    assert [layer.momentum for layer in layers] == momenta
    assert all(layer.num_batches_tracked is count for layer, count in zip(layers, counts, strict=True))
    assert all(count.dtype == torch.int64 for count in counts)
    assert all(torch.equal(p, held) and p.grad is None for p, held in zip(model.parameters(), weights, strict=True))


def test_statistics_that_are_no_numbers_are_mended():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(torch.nan)
    model[0].running_var.fill_(torch.inf)
    recalibrate(model, batches(8))
    assert all(torch.isfinite(buffer).all() for buffer in statistics(model))


def test_a_layer_that_was_not_called_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.other.running_mean.fill_(7.0)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    recalibrate(model, batches(8))
    assert model.other.running_mean.tolist() == [7.0, 7.0, 7.0]
    assert model.used.num_batches_tracked == 1


def test_a_failure_on_the_way_restores_everything():
    model, data = small("ODE").train(), [*DATA[:2], randn(4, 2, 8, 8)]
    model(DATA[2])
    before, modes = statistics(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate(model, data)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert {m.momentum for m in model.modules() if isinstance(m, BatchNorm)} == {0.1}


def test_pairs_with_labels_will_do_and_single_samples_are_left_out():
    one, two = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    data = batches(8, 8)
    recalibrate(one, data)
    recalibrate(two, [*((x, torch.zeros(8)) for x in data), (randn(1, 3, 6, 6), torch.zeros(1))])
    assert all(torch.equal(a, b) for a, b in zip(statistics(one), statistics(two), strict=True))


@pytest.mark.parametrize("data", [[], [randn(1, 3, 6, 6)]])
def test_data_that_nothing_can_be_averaged_over_is_refused(data):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model(batches(8)[0])
    before = statistics(model)
    with pytest.raises(InvalidInput, match="at least 2 samples"):
        recalibrate(model, data)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))


def test_mask_intervals_are_nothing_to_a_recalibration_on_another_grid():
    """Batch norms alone are in training, and they draw nothing: the grid need not have the intervals' ends."""
    block = ODEBlock(Branch(4, Stack(norm="batch")), "euler", 4, mask_intervals=4)
    with solver_settings(block, steps=3):
        assert recalibrate(block, [torch.randn(8, 4, 5, 5)]) == 2


def test_a_net_without_batch_norms_has_nothing_to_recalibrate():
    assert recalibrate(small("residual", norm="group"), DATA) == 0
    assert recalibrate(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), DATA) == 0
