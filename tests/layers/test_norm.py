"""Normalizations: against torch's own, the sets of their statistics, and batch norm indexed by time."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.ode import ODEBlock, solver_settings
from resode.blocks.residual import ResidualBlock
from resode.errors import InvalidInput
from resode.layers.context import evaluate
from resode.layers.norm import (
    NORMS,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    PixelNorm,
    hat_weights,
    index_statistics,
    make_norm,
    scatter_weights,
)
from resode.stack import Stack

KNOTS = (0.0, 0.25, 0.5, 1.0)


def images(b=6, c=8, h=5, w=4, seed=0, dtype=torch.float64):
    draw = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return draw * torch.linspace(0.5, 3, c, dtype=dtype).view(-1, 1, 1) + 2.0


def randomize(module, seed=1):
    """Give the affine parameters values that no symmetry hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5)
    return module


def same_parameters(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            b.copy_(a.view_as(b))
    return theirs


# --- against torch's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_batch_norm_is_torchs_in_training_and_evaluation(momentum):
    ours, theirs = BatchNorm(8, momentum=momentum).double(), nn.BatchNorm2d(8, momentum=momentum).double()
    same_parameters(randomize(ours), theirs)
    for seed in range(3):
        x = images(seed=seed)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    ours.eval(), theirs.eval()
    assert torch.equal(ours(images(seed=9)), theirs(images(seed=9)))


def test_layer_norm_with_an_elementwise_map_is_torchs():
    ours, theirs = LayerNorm(8, (5, 4)).double(), nn.LayerNorm((8, 5, 4)).double()
    same_parameters(randomize(ours), theirs)
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_layer_norm_with_a_map_by_channel_is_torchs_group_norm_of_one_group():
    ours, theirs = LayerNorm(8).double(), nn.GroupNorm(1, 8).double()
    same_parameters(randomize(ours), theirs)
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_pixel_norm_is_torchs_layer_norm_over_channels():
    ours, theirs = PixelNorm(8).double(), nn.LayerNorm(8, eps=1e-6).double()
    same_parameters(randomize(ours), theirs)
    torch.testing.assert_close(ours(images()), theirs(images().permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_instance_norm_is_torchs():
    ours, theirs = InstanceNorm(8).double(), nn.InstanceNorm2d(8, affine=True).double()
    same_parameters(randomize(ours), theirs)
    torch.testing.assert_close(ours(images()), theirs(images()))


@pytest.mark.parametrize("channels", [8, 16, 24, 64, 7])
def test_group_norm_divides_the_channels_into_equal_groups(channels):
    norm = make_norm("group", channels).double()
    assert channels % norm.num_groups == 0
    x = images(c=channels)
    torch.testing.assert_close(norm(x), nn.GroupNorm(norm.num_groups, channels).double()(x))


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_group_norm_is_neither_layer_nor_instance_norm(channels):
    x = images(c=channels)
    out = make_norm("group", channels).double()(x)
    for name in ("layer", "instance"):
        assert (out - make_norm(name, channels).double()(x)).abs().max() > 0.01


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, PixelNorm, InstanceNorm, lambda c, eps: GroupNorm(2, c, eps)])
def test_epsilon_is_added_to_the_variance(make):
    """Of values ±a, as many of each in every set: out = ±a/√(a² + ε)."""
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 2, 1)[:, :, :, None].double()
    for a, eps in ((0.1, 1e-3), (2.0, 0.5)):
        expected = signs * a / math.sqrt(a**2 + eps)
        torch.testing.assert_close(make(4, eps=eps).double()(a * signs), expected, rtol=1e-9, atol=0)


# --- the sets over which the statistics are taken --------------------------------------------------------------------

AXES = {"batch": (0, 2, 3), "layer": (1, 2, 3), "pixel": (1,), "instance": (2, 3)}


@pytest.mark.parametrize(("name", "axes"), AXES.items())
def test_statistics_are_those_of_the_norms_set(name, axes):
    out = make_norm(name, 8).double()(images())
    var, mean = torch.var_mean(out, axes, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)
    for other in set(AXES.values()) - {axes}:
        # Not over another set: so the check above is not one that any norm passes.
        assert not torch.allclose(out.mean(other), torch.zeros((), dtype=out.dtype), atol=1e-3) or set(axes) < set(
            other
        )


def test_group_norms_statistics_are_those_of_its_groups():
    norm = make_norm("group", 16).double()
    out = norm(images(c=16)).view(6, norm.num_groups, -1)
    torch.testing.assert_close(out.mean(-1), torch.zeros_like(out[..., 0]))
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones_like(out[..., 0]), rtol=1e-3, atol=0)


def test_none_changes_nothing():
    assert torch.equal(make_norm("none", 8)(images()), images())


@pytest.mark.parametrize("name", [n for n in NORMS if n not in ("none", "instance")])
def test_vectors_are_images_of_one_pixel(name):
    x = images()[:, :, 0, 0]
    norm = randomize(make_norm(name, 8).double())
    twin = copy.deepcopy(norm)
    torch.testing.assert_close(norm(x), twin(x[:, :, None, None])[:, :, 0, 0])


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 32])
@pytest.mark.parametrize("name", [n for n in NORMS if n not in ("none", "instance")])
def test_no_norm_loses_a_vector(name, channels):
    """Groups of one channel give β whatever x is, and groups of two its sign: derivative 0 either way."""
    x = images(c=channels)[:, :, 0, 0].requires_grad_()
    (make_norm(name, channels).double()(x) * images(c=channels, seed=5)[:, :, 0, 0]).sum().backward()
    assert (x.grad.abs() > 1e-3).double().mean() > 0.5


@pytest.mark.parametrize(("name", "count"), [("batch", 16), ("layer", 16), ("pixel", 16), ("instance", 16)])
def test_a_map_by_channel_has_two_parameters_a_channel(name, count):
    assert sum(p.numel() for p in make_norm(name, 8).parameters()) == count


@given(c=st.integers(1, 9), h=st.integers(1, 9), w=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_an_elementwise_map_has_two_parameters_an_element(c, h, w):
    norm = make_norm("layer", c, (h, w), "elementwise")
    assert sum(p.numel() for p in norm.parameters()) == 2 * h * w * c


def test_an_elementwise_map_acts_on_single_elements():
    norm = make_norm("layer", 2, (3, 3), "elementwise").double()
    x = images(c=2, h=3, w=3)
    before = norm(x)
    with torch.no_grad():
        norm.weight[1, 2, 0], norm.bias[0, 0, 1] = 5.0, 7.0
    changed = (norm(x) - before).abs().amax(0) > 1e-9
    assert changed.nonzero().tolist() == [[0, 0, 1], [1, 2, 0]]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_norm_is_refused_with_the_choices():
    with pytest.raises(InvalidInput, match=r"'btach'.*batch, layer, pixel, instance, group, none"):
        make_norm("btach", 8)


def test_an_unknown_affine_map_is_refused_with_the_choices():
    with pytest.raises(InvalidInput, match=r"'pixelwise'.*channel, elementwise"):
        make_norm("layer", 8, affine="pixelwise")


@pytest.mark.parametrize("name", [n for n in NORMS if n != "layer"])
def test_an_elementwise_map_of_another_norm_is_refused(name):
    with pytest.raises(InvalidInput, match=f"'layer', not of '{name}'"):
        make_norm(name, 8, (4, 4), "elementwise")


def test_an_elementwise_map_without_a_size_is_refused():
    with pytest.raises(InvalidInput, match="size=\\(H, W\\)"):
        make_norm("layer", 8, None, "elementwise")


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 5, 5), (2, 7, 4, 4), (2, 8)])
def test_an_elementwise_map_refuses_an_image_of_another_size(shape):
    with pytest.raises(InvalidInput, match=r"\(8, 4, 4\).*affine='channel'"):
        make_norm("layer", 8, (4, 4), "elementwise")(torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 8), (0, 8, 1, 1)])
def test_instance_norm_refuses_a_single_pixel(shape):
    with pytest.raises(InvalidInput, match="another norm"):
        make_norm("instance", 8)(torch.randn(shape))


ONE_VALUE = {
    "layer": make_norm("layer", 1),
    "elementwise layer": make_norm("layer", 1, (1, 1), "elementwise"),
    "pixel": make_norm("pixel", 1),
    "group": make_norm("group", 1),
    "groups": GroupNorm(8, 8),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_a_norm_refuses_a_set_of_one_value(name, batch):
    """Its variance is 0: what is left is β, whatever the input is."""
    norm = ONE_VALUE[name]
    with pytest.raises(InvalidInput, match=rf"\({batch}, \d, 1, 1\) has one value.*another norm"):
        norm(torch.randn(batch, norm.weight.shape[0], 1, 1))


@pytest.mark.parametrize("name", ["layer", "group"])
def test_one_channel_of_several_pixels_has_a_variance(name):
    out = make_norm(name, 1).double()(images(c=1))
    torch.testing.assert_close(out.var((1, 2, 3), correction=0), torch.ones(6).double(), rtol=1e-3, atol=0)


def test_batch_norm_refuses_a_state_without_channels():
    with pytest.raises(InvalidInput, match=r"\(8,\)"):
        BatchNorm(8)(torch.randn(8))


@pytest.mark.parametrize("knots", [(), (0.0, 0.0), (0.5, 0.25), (0.0, float("nan"))])
def test_knots_must_increase(knots):
    with pytest.raises(InvalidInput, match="increase"):
        BatchNorm(8).set_knots(knots)


def test_several_knots_need_a_time():
    norm = BatchNorm(8)
    norm.set_knots(KNOTS)
    with pytest.raises(InvalidInput, match=r"resode\.evaluate"):
        norm(torch.randn(2, 8, 3, 3))


# --- hat functions ---------------------------------------------------------------------------------------------------

knot_sets = st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True).map(
    lambda ks: tuple(sorted(k / 1000 for k in ks))
)
times = st.floats(-0.5, 1.5, allow_nan=False)


@given(knots=knot_sets, t=times)
def test_hat_weights_are_a_partition_of_unity_and_reproduce_linear_functions(knots, t):
    found = hat_weights(t, knots)
    assert 1 <= len(found) <= 2
    assert all(w >= 0.0 for _, w in found)
    assert sum(w for _, w in found) == pytest.approx(1.0, abs=1e-12)
    clamped = min(max(t, knots[0]), knots[-1])
    assert sum(w * knots[k] for k, w in found) == pytest.approx(clamped, abs=1e-8)


@given(knots=knot_sets, k=st.integers(0, 11))
def test_a_knot_has_its_own_hat_to_itself(knots, k):
    k %= len(knots)
    assert hat_weights(knots[k], knots) == [(k, 1.0)]


@given(knots=knot_sets, ts=st.lists(times, min_size=1, max_size=20))
def test_every_knot_takes_an_average_of_what_was_met(knots, ts):
    weights = np.array(scatter_weights(ts, knots))
    assert weights.shape == (len(knots), len(ts))
    assert (weights >= 0.0).all()
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-9)


def hats(knots, ts):
    """φ_k(t), from the definition: the piecewise linear interpolants of the unit vectors."""
    return np.array([np.interp(ts, knots, unit) for unit in np.eye(len(knots))])


def averaged(knots, ts, values):
    """m_k = Σ φ_k(t_i) m_i / Σ φ_k(t_i); unvisited knots take the neighbours' by linear interpolation."""
    phi = hats(knots, ts)
    phi[phi < 1e-9] = 0.0
    visited = phi.sum(1) > 0
    seen = (phi[visited] / phi[visited].sum(1, keepdims=True)) @ np.asarray(values)
    where = np.asarray(knots)[visited]
    return np.stack([np.interp(knots, where, column) for column in seen.T], 1)


def absorbing(knots, ts, values):
    norm = BatchNorm(values.shape[1], momentum=1.0).double()
    norm.set_knots(knots)
    norm.absorb(list(ts), list(values), list(values + 1.0), whole=True)
    return norm


@given(knots=knot_sets.filter(lambda ks: len(ks) > 1), ts=st.lists(st.integers(0, 40), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_moments_are_scattered_by_hat_weights_and_unvisited_knots_take_their_neighbours(knots, ts):
    ts = [t / 40 for t in ts]
    values = torch.randn(len(ts), 3, dtype=torch.float64)
    norm = absorbing(knots, ts, values)
    np.testing.assert_allclose(norm.running_mean, averaged(knots, ts, values), atol=1e-6)
    np.testing.assert_allclose(norm.running_var, averaged(knots, ts, values + 1.0), atol=1e-6)


def test_unvisited_knots_by_hand():
    values = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    norm = absorbing((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), [0.2, 0.6], values)
    torch.testing.assert_close(norm.running_mean.flatten(), torch.tensor([1.0, 1, 2, 3, 3, 3], dtype=torch.float64))


# --- evaluation between the knots ------------------------------------------------------------------------------------


class NormField(nn.Module):
    """f(t, h) = norm(h)·(slope + a steep bump in t): a field whose values need the batch's own statistics."""

    def __init__(self, norm, bump=0.0):
        super().__init__()
        self.norm, self.bump = norm, bump
        self.seen = []

    def forward(self, t, h):
        t = torch.as_tensor(t, dtype=torch.float64)
        self.seen.append((float(t), h.detach()))
        return torch.tanh(self.norm(h)) * (1.0 + t + self.bump * torch.exp(-(((t - 0.6) / 0.1) ** 2)))


class OnlyNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, t, h):
        return self.norm(h)


def indexed(momentum=0.1, knots=KNOTS):
    norm = randomize(BatchNorm(8, momentum=momentum).double())
    norm.set_knots(knots)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=torch.Generator().manual_seed(2)))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=torch.Generator().manual_seed(3)) + 0.5)
    return norm


@pytest.mark.parametrize("t", [-1.0, 0.0, 0.1, 0.25, 0.3, 0.5, 0.77, 1.0, 2.0])
def test_evaluation_interpolates_between_knots_and_clamps_beyond(t):
    norm = indexed().eval()
    phi = torch.tensor(hats(KNOTS, t))
    x = images()
    expected = F.batch_norm(
        x, phi @ norm.running_mean, phi @ norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    torch.testing.assert_close(evaluate(OnlyNorm(norm), t, x), expected)
    torch.testing.assert_close(evaluate(OnlyNorm(norm), torch.tensor(t), x), expected, rtol=1e-5, atol=1e-5)
    for got, held in zip(norm.statistics(t), (norm.running_mean, norm.running_var), strict=True):
        torch.testing.assert_close(got, phi @ held)


def test_new_knots_take_the_interpolated_statistics():
    norm, finer = indexed(), (0.0, 0.125, 0.25, 0.5, 0.6, 1.0)
    before = {t: norm.statistics(t) for t in (*finer, 0.05, 0.8)}
    norm.set_knots(finer)
    assert norm.running_mean.shape == norm.running_var.shape == (6, 8)
    for t, held in before.items():
        for a, b in zip(norm.statistics(t), held, strict=True):
            torch.testing.assert_close(a, b)
    norm.set_knots((0.125,))
    assert norm.running_mean.shape == (8,)
    torch.testing.assert_close(norm.running_mean, before[0.125][0])


def test_a_new_knot_has_met_as_many_batches_as_each_of_those_it_comes_from():
    norm = indexed()
    norm.set_knots((0.0, 0.5, 1.0))
    norm.num_batches_tracked.copy_(torch.tensor([7, 3, 5]))
    norm.set_knots((0.0, 0.25, 0.5, 0.75, 1.0, 2.0))
    assert norm.num_batches_tracked.tolist() == [7, 3, 3, 3, 5, 5]
    norm.set_knots((0.0, 1.0))
    assert norm.num_batches_tracked.tolist() == [7, 5]
    norm.set_knots((1.0,))
    assert norm.num_batches_tracked.ndim == 0
    assert norm.num_batches_tracked == 5


# --- one momentum update a forward solve -----------------------------------------------------------------------------


def moments(seen):
    """Batch mean and unbiased variance of each state met."""
    return (
        np.stack([h.mean((0, 2, 3)).numpy() for _, h in seen]),
        np.stack([h.var((0, 2, 3), correction=1).numpy() for _, h in seen]),
    )


def expect_one_update(norm, before, seen, momentum):
    ts = [t for t, _ in seen]
    for name, met in zip(("running_mean", "running_var"), moments(seen), strict=True):
        expected = (1 - momentum) * before[name].numpy() + momentum * averaged(norm.knots, ts, met)
        np.testing.assert_allclose(getattr(norm, name).numpy(), expected, rtol=1e-6, atol=1e-8, err_msg=name)
    assert torch.equal(norm.num_batches_tracked, before["num_batches_tracked"] + 1)


def buffers(norm):
    return {name: b.clone() for name, b in norm.named_buffers()}


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("knots", [None, 3, 12, 1])
def test_a_fixed_grid_makes_one_update_from_all_its_stages(solver, stages, knots, gradient):
    norm = BatchNorm(8, momentum=0.3).double()
    field = NormField(norm)
    block = ODEBlock(field, solver, steps=5, knots=knots, gradient=gradient)
    assert len(norm.knots) == (knots or 6)
    if len(norm.knots) > 1:
        assert (norm.knots[0], norm.knots[-1]) == (0.0, 1.0)
    before = buffers(norm)
    out = block(images().requires_grad_())
    assert len(field.seen) == 5 * stages
    if len(norm.knots) > 1:
        expect_one_update(norm, before, field.seen, 0.3)
    else:
        mean, var = (m.mean(0) for m in moments(field.seen))
        np.testing.assert_allclose(norm.running_mean, 0.3 * mean)
        np.testing.assert_allclose(norm.running_var, 0.7 + 0.3 * var)
    after = buffers(norm)
    out.square().sum().backward()  # an adjoint evaluates again, and must not update again
    assert all(torch.equal(a, b) for a, b in zip(after.values(), norm.buffers(), strict=True))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_every_forward_pass_counts_once_and_evaluation_never(solver):
    norm = BatchNorm(8).double()
    block = ODEBlock(NormField(norm), solver, steps=None if solver == "dopri5" else 3)
    for n in range(1, 4):
        block(images(seed=n))
        assert (norm.num_batches_tracked == n).all()
    block.trajectory(images(), [0.0, 0.4, 1.0])
    assert (norm.num_batches_tracked == 4).all()
    with torch.no_grad():
        block(images())
    assert (norm.num_batches_tracked == 5).all()
    after = buffers(norm)
    block.eval()(images())
    block.trajectory(images(), [0.0, 0.4, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(after.values(), norm.buffers(), strict=True))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_under_autocast_the_statistics_are_those_of_full_precision(solver):
    norm = BatchNorm(8, momentum=0.3)
    field = NormField(norm)
    block = ODEBlock(field, solver, steps=None if solver == "dopri5" else 3)
    before, x = buffers(norm), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert norm.running_mean.dtype == torch.float32
    if solver == "rk4":
        for name, met in zip(("running_mean", "running_var"), moments(field.seen), strict=True):
            expected = 0.7 * before[name].numpy() + 0.3 * averaged(norm.knots, [t for t, _ in field.seen], met)
            np.testing.assert_allclose(getattr(norm, name), expected, rtol=1e-4)
    twin = BatchNorm(8, momentum=0.3)
    ODEBlock(NormField(twin), solver, steps=None if solver == "dopri5" else 3)(x)
    torch.testing.assert_close(norm.running_mean, twin.running_mean, rtol=2e-3, atol=2e-3)


def test_a_solve_that_fails_leaves_the_statistics():
    norm = BatchNorm(8).double()
    block = ODEBlock(NormField(norm), "rk4", steps=3)
    before = buffers(norm)
    block.branch.register_forward_hook(lambda *_: 1 / 0 if len(block.branch.seen) == 7 else None)
    with pytest.raises(ZeroDivisionError):
        block(images())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.buffers(), strict=True))


def test_without_momentum_the_statistics_are_the_mean_over_forward_passes():
    norm, each = BatchNorm(8, momentum=None).double(), BatchNorm(8, momentum=1.0).double()
    block, single = ODEBlock(NormField(norm), "heun", steps=3), ODEBlock(NormField(each), "heun", steps=3)
    means, variances = [], []
    for seed in range(4):
        block(images(seed=seed)), single(images(seed=seed))
        means.append(each.running_mean.clone())
        variances.append(each.running_var.clone())
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_torchs_update_bn_recomputes_the_statistics_of_a_whole_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(8), ODEBlock(NormField(BatchNorm(8)), "rk4", steps=3)).double()
    norm = model[1].branch.norm
    with torch.no_grad():
        norm.running_mean.fill_(99.0)
    loader = [images(seed=seed) for seed in range(3)]
    expected = []
    for x in loader:
        twin = copy.deepcopy(model)
        twin[1].branch.norm.momentum = 1.0
        twin(x)
        expected.append(twin[1].branch.norm.running_mean)
    torch.optim.swa_utils.update_bn(loader, model)
    assert norm.momentum == 0.1
    assert norm.running_mean.shape == (4, 8)
    torch.testing.assert_close(norm.running_mean, torch.stack(expected).mean(0))


def test_state_dict_round_trip():
    model = ODEBlock(NormField(BatchNorm(8)), "rk4", steps=3).double()
    model(images())
    twin = ODEBlock(NormField(BatchNorm(8)), "rk4", steps=3).double()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model.eval()(images()), twin.eval()(images()))
    other = ODEBlock(NormField(BatchNorm(8)), "rk4", steps=5).double()
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(model.state_dict())


# --- in blocks and nets ----------------------------------------------------------------------------------------------


def with_torchs_norms(module):
    """A copy with nn.BatchNorm2d in the place of ours."""
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BatchNorm):
            parent, _, child = name.rpartition(".")
            theirs = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum).to(layer.weight.dtype)
            theirs.load_state_dict(layer.state_dict())
            setattr(module.get_submodule(parent), child, theirs)
    return module


@pytest.mark.parametrize("kind", ["basic", "preact", "bottleneck"])
def test_in_a_residual_block_batch_norm_is_torchs_through_training(kind):
    torch.manual_seed(0)
    ours = nn.Sequential(*(ResidualBlock(Branch(8, Stack(), kind), post=nn.ReLU()) for _ in range(2))).double()
    theirs = with_torchs_norms(ours)
    assert not any(isinstance(m, BatchNorm) for m in theirs.modules())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (ours, theirs)]
    for seed in range(5):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(images(seed=seed)).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.eval()(images()), theirs.eval()(images()))


def test_a_tied_residual_net_indexes_the_statistics_by_the_blocks_times():
    knots = (0.0, 1 / 3, 2 / 3)
    for momentum in (0.3, None):
        branch = NormField(BatchNorm(8, momentum=momentum).double())
        index_statistics(branch, knots)
        net = nn.Sequential(*(ResidualBlock(branch, t=t, scale=3.0) for t in knots))
        twins = [nn.BatchNorm2d(8, momentum=momentum).double() for _ in knots]
        for seed in range(3):
            branch.seen.clear()
            net(images(seed=seed))
            for twin, (_, h) in zip(twins, branch.seen, strict=True):
                twin(h)
        for k, twin in enumerate(twins):
            torch.testing.assert_close(branch.norm.running_mean[k], twin.running_mean)
            torch.testing.assert_close(branch.norm.running_var[k], twin.running_var)
        net.eval()
        branch.seen.clear()
        net(images(seed=7))
        h = branch.seen[1][1]
        torch.testing.assert_close(evaluate(OnlyNorm(branch.norm), 1 / 3, h), twins[1].eval()(h))


def test_an_ode_net_trained_on_one_grid_evaluates_on_others():
    torch.manual_seed(0)
    block = ODEBlock(Branch(8, Stack(activation="tanh"), time="concat"), "rk4", steps=8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for seed in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images(c=3, seed=seed, dtype=torch.float32)), torch.arange(6) % 4).backward()
        optimizer.step()
    model.eval()
    x = images(c=3, seed=99, dtype=torch.float32)
    with torch.no_grad():
        trained = model(x)
        for other in ({"steps": 5}, {"steps": 16}, {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}):
            with solver_settings(model, **other):
                assert (model(x) - trained).norm() < 0.02 * trained.norm()
        # The statistics are those of each time: at one time's throughout, the net is another.
        index_statistics(model, (0.0,))
        assert (model(x) - trained).norm() > 0.05 * trained.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_torchs_and_keeps_the_layout(layout, dtype):
    torch.manual_seed(0)
    ours = make_norm("group", 16)
    theirs = nn.GroupNorm(ours.num_groups, 16)
    for layer in (ours, theirs):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 16, 5, 5).to(dtype).to(memory_format=layout)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    out, expected = ours(one), theirs(other)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, expected, **close)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
