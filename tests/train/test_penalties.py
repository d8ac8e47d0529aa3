"""Weights decay, biases, norms and single numbers do not; L1 and group sparsity are the sums of their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from resode import InvalidInput, NetConfig, Stack, build
from resode.blocks.varying import varying_layers
from resode.layers import NORMS, Conv2d
from resode.limits import lift
from resode.nets import parameter_count
from resode.train.penalties import Penalties, Zeroed, filters, parameter_groups, penalty, zeroed_filters

NETS = ("lenet5", "vgg", "plain", "resnet", "odenet")


def small(net, **settings):
    defaults = {"depth": 8, "width": 4, "blocks": 2, "size": (12, 12), "steps": 1}
    return build(NetConfig(net=net, **{**defaults, **settings}), seed=0)


def grouped(model, decay=0.1):
    """The names of the parameters that decay, and of those that do not."""
    names = {id(p): name for name, p in model.named_parameters()}
    one, two = parameter_groups(model, decay)
    assert (one["weight_decay"], two["weight_decay"]) == (decay, 0.0)
    return [[names[id(p)] for p in group["params"]] for group in (one, two)]


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_is_in_one_group(net):
    model = small(net, tied=True, scale="skipinit", time="film", kind="convnext")
    decay, rest = grouped(model)
    assert sorted(decay + rest) == sorted(name for name, _ in model.named_parameters())
    assert len(set(decay + rest)) == len(decay + rest)
    groups = parameter_groups(model, 0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == parameter_count(model)


@pytest.mark.parametrize(("norm", "affine"), [*((norm, "channel") for norm in NORMS), ("layer", "elementwise")])
@pytest.mark.parametrize("net", NETS)
def test_weights_of_convolutions_and_linear_layers_decay_and_nothing_else(net, norm, affine):
    model = small(net, stack=Stack(norm=norm, norm_affine=affine))
    expected = [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
        for part, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim > 1
    ]
    assert sorted(grouped(model)[0]) == sorted(expected)


@pytest.mark.parametrize("time", ["constant", "linear", "fourier"])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_parameters_that_vary_with_t_decay_as_those_that_do_not(time, norm):
    stack = Stack(norm=norm)
    assert grouped(small("odenet", stack=stack, time=time)) == grouped(small("odenet", stack=stack, time="none"))


def test_norms_of_torch_do_not_decay_either():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 4)), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    assert grouped(model)[0] == ["0.weight"]


def test_single_numbers_and_layer_scales_do_not_decay():
    model = small("resnet", depth=14, scale="skipinit", kind="convnext")
    decay, rest = grouped(model)
    assert sum(name.endswith(".scale") for name in rest) == 4
    assert not any(name.endswith((".scale", ".bias")) for name in decay)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert grouped(model) == [["1.weight"], ["1.bias"]]


def test_decay_is_decoupled_from_what_does_not_decay():
    model = small("resnet", stack=Stack(norm="layer", norm_affine="elementwise"))
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(parameter_groups(model, 0.5), lr=0.1).step()
    for name, parameter in model.named_parameters():
        of_norm = parameter.ndim < 2 or parameter.ndim == 3
        torch.testing.assert_close(parameter.detach(), held[name] * (1.0 if of_norm else 1 - 0.1 * 0.5))


# --- L1 and group sparsity -------------------------------------------------------------------------------------------

TINY = {"depth": 14, "width": 3, "size": (6, 6), "channels": 1, "steps": 2}
BRANCHES = ("resnet", "odenet")
BOTH = Penalties(l1=0.1, group=0.2)


def tiny(net, **settings):
    model = build(NetConfig(net=net, stack=settings.pop("stack", Stack(norm="group")), **TINY, **settings), seed=0)
    return model.double()


@pytest.mark.parametrize("net", BRANCHES)
def test_l1_is_the_sum_of_the_sizes_of_all_that_decays(net):
    model = tiny(net, time="film", kind="convnext")
    expected = sum(np.abs(p.detach().numpy()).sum() for p in parameter_groups(model, 0.1)[0]["params"])
    assert float(penalty(model, Penalties(l1=0.3)).detach()) == pytest.approx(0.3 * expected, rel=1e-13)


@pytest.mark.parametrize("net", BRANCHES)
def test_group_sparsity_goes_over_the_filters(net):
    model, expected, count = tiny(net, time="none"), 0.0, 0
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for row in layer.weight.detach().numpy():
                expected += math.sqrt(row.size) * math.sqrt((row**2).sum())
                count += 1
    assert float(penalty(model, Penalties(group=0.7)).detach()) == pytest.approx(0.7 * expected, rel=1e-13)
    assert sum(len(rows) for rows in filters(model).values()) == count


def test_both_are_added_and_none_is_none():
    model = tiny("resnet")
    l1, group, both = (float(penalty(model, p).detach()) for p in (Penalties(0.1), Penalties(0.0, 0.2), BOTH))
    assert both == pytest.approx(l1 + group, rel=1e-14)
    assert penalty(model, Penalties()) is None


def test_a_filter_of_state_and_time_is_one_group():
    layer = Conv2d(2, 3, 3, time=True)
    (rows,) = filters(layer).values()
    assert rows.shape == (3, 2 * 9 + 9)
    for o in range(3):
        expected = torch.cat([layer.weight[o].flatten(), layer.time_weight[o].flatten()])
        assert torch.equal(rows[o], expected)


@pytest.mark.parametrize("time", ["constant", "linear"])
def test_each_piece_or_knot_has_filters_of_its_own(time):
    """So the penalty of a field on pieces is that of as many blocks."""
    model = tiny("odenet", time=time, knots=2)
    (layers, *_) = varying_layers(model)
    conv = next(layer for layer in layers if isinstance(layer, Conv2d))
    name = next(name for name, layer in model.named_modules() if layer is conv)
    rows = filters(model)[name]
    expected = [conv.weight[k, o].flatten() for k in range(2) for o in range(3)]
    assert torch.equal(rows, torch.stack(expected))


def test_the_penalty_of_a_lifted_net_is_that_of_its_blocks():
    net = build(NetConfig(net="resnet", stack=Stack(norm="group"), **{**TINY, "depth": 20}), seed=0)
    lifted = lift(net)
    torch.testing.assert_close(penalty(lifted, BOTH), penalty(net, BOTH))


def test_all_coefficients_of_a_filter_on_the_fourier_basis_are_one_group():
    model = tiny("odenet", time="fourier", knots=3)
    (layers, *_) = varying_layers(model)
    conv = next(layer for layer in layers if isinstance(layer, Conv2d))
    name = next(name for name, layer in model.named_modules() if layer is conv)
    nn.init.normal_(conv.weight)
    rows = filters(model)[name]
    assert torch.equal(rows, torch.stack([conv.weight[:, o].flatten() for o in range(3)]))


def test_a_layer_or_a_weight_in_several_places_counts_once():
    layer = nn.Linear(3, 3)
    twice, tied = nn.Sequential(layer, layer), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    for model in (twice, tied):
        once = penalty(nn.Sequential(model[0]), BOTH)
        torch.testing.assert_close(penalty(model, BOTH), once)


def test_frozen_layers_count_for_nothing():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    torch.testing.assert_close(penalty(model, BOTH), penalty(model[1], BOTH))


@pytest.mark.parametrize("settings", [Penalties(l1=1.0), Penalties(group=1.0)])
def test_the_gradient_at_zero_is_zero(settings):
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.weight[1, 0] = -2.0
    penalty(layer, settings).backward()
    expected = torch.zeros(3, 4)
    expected[1, 0] = -1.0 if settings.l1 else -2.0  # √4 times the direction
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("net", BRANCHES)
def test_gradients_are_those_of_finite_differences(net):
    model = tiny(net, time="linear" if net == "odenet" else "none")
    weights = parameter_groups(model, 0.1)[0]["params"]
    torch.manual_seed(0)
    along = [torch.randn_like(w) * w.abs() for w in weights]  # so that no sign changes
    value = penalty(model, BOTH)
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value, weights), along, strict=True))
    with torch.no_grad():
        ends = []
        for step in (1e-6, -2e-6):
            for w, d in zip(weights, along, strict=True):
                w += step * d
            ends.append(penalty(model, BOTH))
    assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float(slope.detach()), rel=1e-7)


def test_half_precision_weights_have_a_penalty_in_single():
    value = penalty(nn.Linear(4, 3).half(), BOTH)
    assert value.dtype is torch.float32
    value.backward()


def test_group_sparsity_drives_the_filters_that_are_of_no_use_to_zero():
    """Of a linear layer by its proximal solution: rows with ‖z‖ < λ√|g| are 0, the others are shortened by that."""
    torch.manual_seed(0)
    z = torch.randn(6, 4, dtype=torch.float64) * torch.tensor([2.0, 2.0, 2.0, 0.1, 0.1, 0.1]).double()[:, None]
    layer, strength, lr = nn.Linear(4, 6, bias=False).double(), 0.3, 1e-2
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (layer.weight - z).square().sum() + penalty(layer, Penalties(group=strength))).backward()
        optimizer.step()
    size = z.norm(dim=1, keepdim=True)
    expected = z * (1.0 - strength * 2.0 / size).clamp(min=0.0)
    torch.testing.assert_close(layer.weight.detach()[:3], expected[:3], rtol=1e-10, atol=0.0)
    assert not expected[3:].any()
    assert zeroed_filters(layer, strength * lr) == {"": Zeroed(3, 6)}
    assert zeroed_filters(layer, 0.0) == {"": Zeroed(0, 6)}


def test_zeroed_filters_are_counted_by_layer():
    model = tiny("odenet", time="constant", knots=2)
    with torch.no_grad():
        model.head[-1].weight[4] = 0.0
        (layers, *_) = varying_layers(model)
        conv = next(layer for layer in layers if isinstance(layer, Conv2d))
        conv.weight[1, :2] = 1e-4
    name = next(name for name, layer in model.named_modules() if layer is conv)
    found = zeroed_filters(model, 1e-3)
    assert found.pop(name) == Zeroed(2, 6)
    head = next(name for name, layer in model.named_modules() if layer is model.head[-1])
    assert found.pop(head) == Zeroed(1, 10)
    assert all(layer.zero == 0 for layer in found.values())


@pytest.mark.parametrize("name", ["l1", "group"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_penalties_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InvalidInput, match=f"penalty {name} is {value}"):
        Penalties(**{name: value})


def test_what_has_no_weights_is_refused():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(InvalidInput, match="nothing to penalize"):
            penalty(model, BOTH)
        with pytest.raises(InvalidInput, match="no convolution or linear layer"):
            zeroed_filters(model, 0.1)
    with pytest.raises(InvalidInput, match="threshold is -1"):
        zeroed_filters(nn.Linear(2, 2), -1.0)
