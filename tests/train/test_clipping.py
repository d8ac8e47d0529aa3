"""Adaptive gradient clipping: a loop over the units, the units of weights that vary, and what is left alone."""

import copy

import pytest
import torch
from torch import nn

from resode import nets
from resode.blocks import Branch, ODEBlock
from resode.blocks.varying import varying_layers
from resode.errors import InvalidInput
from resode.stack import Stack
from resode.train.clipping import adaptive_clip_


def naive(weight, gradient, clipping, eps):
    """Equation 3, unit by unit: filters and rows; vectors and numbers whole."""
    units = [()] if weight.squeeze().ndim <= 1 else [(i,) for i in range(len(weight))]
    clipped = gradient.clone()
    for unit in units:
        w, g = float(weight[unit].norm()), float(gradient[unit].norm())
        if g > clipping * max(w, eps):
            clipped[unit] = gradient[unit] * (clipping * max(w, eps) / g)
    return clipped


def with_gradients(net, seed=0):
    """Gradients of all sizes, so that some units are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        size = torch.exp(4.0 * torch.rand(parameter.shape[:1], generator=generator) - 5.0)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (noise * size.view(-1, *[1] * (parameter.ndim - 1)) if parameter.ndim else noise).to(parameter)
    return net


@pytest.mark.parametrize("clipping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_it_is_the_loop_over_the_units_but_for_the_last_linear_layer(clipping, eps):
    stack = Stack(norm="none", conv="scaled-weight-standardized")
    torch.manual_seed(0)
    net = nets.resnet(14, stack, kind="preact", scale="skipinit", width=4, channels=3, size=(8, 8)).double()
    net.head = nn.Sequential(*net.head[:-1], nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)).double()
    with_gradients(net)
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    adaptive_clip_(net, clipping, eps=eps)
    last, changed = {f"head.{len(net.head) - 1}.{name}" for name in ("weight", "bias")}, 0
    for name, parameter in net.named_parameters():
        expected = before[name] if name in last else naive(parameter.detach(), before[name], clipping, eps)
        torch.testing.assert_close(parameter.grad, expected, msg=name)
        changed += not torch.equal(parameter.grad, before[name])
    assert last < before.keys()
    assert changed > 10


@pytest.mark.parametrize("time", ["linear", "constant", "fourier"])
def test_units_of_weights_that_vary_are_those_at_each_knot(time):
    torch.manual_seed(0)
    block = ODEBlock(Branch(4, Stack(norm="group"), time=time, knots=4), steps=12)
    net = with_gradients(nn.Sequential(nn.Conv2d(3, 4, 3), block).double())
    twin = with_gradients(copy.deepcopy(net))
    adaptive_clip_(net, 0.05)
    stacked = {p for layers in varying_layers(net) for p in layers.parameters()}
    assert stacked
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        weight, g = other.detach(), other.grad
        if parameter in stacked:
            expected = torch.stack([naive(weight[k], g[k], 0.05, 1e-3) for k in range(len(weight))])
        else:
            expected = naive(weight, g, 0.05, 1e-3)
        torch.testing.assert_close(parameter.grad, expected)


def test_the_weights_stay_and_what_has_no_gradient_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    before = [p.detach().clone() for p in net.parameters()]
    net[1].weight.grad = torch.ones_like(net[1].weight)
    adaptive_clip_(net, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert [p.grad is None for p in net.parameters()] == [True, True, False, True, True, True]


@pytest.mark.parametrize("size", [0.0, 1e-35])
def test_a_gradient_of_zero_stays(size):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, size)
    adaptive_clip_(net, 0.01)
    assert all((parameter.grad == torch.tensor(size)).all() for parameter in net.parameters())


def test_norms_of_half_precision_do_not_overflow():
    layer = nn.Conv2d(8, 2, 3, bias=False).half()
    layer.weight.grad = torch.full_like(layer.weight, 6e4)
    adaptive_clip_(layer, 0.1)
    expected = 0.1 * layer.weight.detach().float().flatten(1).norm(dim=1)
    torch.testing.assert_close(layer.weight.grad.float().flatten(1).norm(dim=1), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(("clipping", "eps"), [(0.0, 1e-3), (-1.0, 1e-3), (float("nan"), 1e-3), (0.01, 0.0)])
def test_numbers_that_make_no_sense_are_refused(clipping, eps):
    with pytest.raises(InvalidInput, match="above 0"):
        adaptive_clip_(nn.Linear(2, 2), clipping, eps=eps)
