"""Weights decay; biases, norms and single numbers do not."""

import pytest
import torch
from torch import nn

from resode import NetConfig, Stack, build
from resode.layers import NORMS
from resode.nets import parameter_count
from resode.train.penalties import parameter_groups

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
