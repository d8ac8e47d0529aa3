"""Scaled standardized weights: gains in closed form, variance through branches without norms, and in solves."""

import copy
import math

import pytest
import torch
from torch import nn

import resode.layers.conv as conv
from resode import nets
from resode.blocks import Branch, ODEBlock, ResidualBlock
from resode.errors import InvalidInput
from resode.layers import Conv2d, activation_gain, standardize_weight
from resode.layers.fold import fold
from resode.layers.norm import BatchNorm
from resode.stack import ACTIVATIONS, Stack

SCALED = "scaled-weight-standardized"


def free(activation="relu", **settings):
    return Stack(norm="none", conv=SCALED, activation=activation, **settings)


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, Conv2d)]


# --- gains -----------------------------------------------------------------------------------------------------------


def test_gains_in_closed_form():
    slope = 0.01
    leaky = 0.5 * (1 + slope**2) - (1 - slope) ** 2 / (2 * math.pi)
    assert activation_gain(nn.ReLU()) == pytest.approx(math.sqrt(2) / math.sqrt(1 - 1 / math.pi), rel=1e-12)
    assert activation_gain(nn.LeakyReLU(slope)) == pytest.approx(1 / math.sqrt(leaky), rel=1e-12)
    assert activation_gain(nn.Identity()) == pytest.approx(1.0, rel=1e-12)
    assert activation_gain(lambda z: 3.0 * z + 1.0) == pytest.approx(1 / 3, rel=1e-12)
    assert activation_gain(torch.abs) == pytest.approx(1 / math.sqrt(1 - 2 / math.pi), rel=1e-12)
    # exp(z) is lognormal; erf(z/√2) = 2Φ(z) − 1 is uniform on [−1, 1].
    assert activation_gain(torch.exp) == pytest.approx(1 / math.sqrt(math.e * (math.e - 1)), rel=1e-12)
    assert activation_gain(lambda z: torch.erf(z / math.sqrt(2))) == pytest.approx(math.sqrt(3), rel=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gains_of_every_activation_give_its_output_the_variance_one(name):
    z = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    activation = ACTIVATIONS[name]()
    assert float((activation_gain(activation) * activation(z)).var()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("activation", [torch.zeros_like, lambda z: z / 0.0])
def test_an_activation_that_does_not_vary_has_no_gain(activation):
    with pytest.raises(InvalidInput, match="has no gain"):
        activation_gain(activation)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_the_gains_times_the_standardized_ones():
    layer = Conv2d(4, 5, 3, scaled=True, input_gain=1.7).double()
    with torch.no_grad():
        layer.gain.copy_(torch.arange(1.0, 6.0))
    expected = 1.7 * torch.arange(1.0, 6.0).view(-1, 1, 1, 1) * standardize_weight(layer.weight)
    torch.testing.assert_close(layer.effective_weight(), expected)
    layer(torch.randn(2, 4, 6, 6).double()).square().sum().backward()
    assert (layer.gain.grad != 0).all()
    assert "scaled=True, input_gain=1.7" in repr(layer)


def test_the_other_convolutions_have_no_gain():
    for stack in (Stack(), Stack(conv="weight-standardized")):
        layer = stack.conv_layer(4, 5, 3, activated=True)
        assert layer.gain is None
        assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_a_gain_that_is_no_number_above_zero_is_refused():
    with pytest.raises(InvalidInput, match="above 0"):
        Conv2d(4, 5, 3, scaled=True, input_gain=0.0)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_the_gain_of_the_activation_is_where_the_input_comes_from_it(activation):
    gamma = activation_gain(ACTIVATIONS[activation]())

    def gains(kind):
        return [c.input_gain / gamma for c in convolutions(Branch(8, free(activation), kind))]

    assert gains("preact") == [1.0, 1.0]
    assert gains("basic") == [1.0, 1.0]  # the block before it ends with the activation
    assert gains("bottleneck") == [1.0, 1.0, 1.0]
    assert gains("convnext") == pytest.approx([1 / gamma, 1 / gamma, 1.0])
    net = nets.plain(8, free(activation), width=4, channels=3, size=(8, 8))
    assert [c.input_gain for c in convolutions(net)] == [1.0, *[gamma] * 6]
    assert [c.input_gain for c in convolutions(nets.vgg(2, 2, free(activation), size=(8, 8)))] == [1.0, *[gamma] * 3]


def test_a_batch_norm_is_folded_into_scaled_weights():
    torch.manual_seed(0)
    layer, norm = Conv2d(4, 5, 3, scaled=True, input_gain=1.7).double(), BatchNorm(5).double()
    with torch.no_grad():
        layer.gain.uniform_(0.5, 2.0)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 6, 6).double()
    expected = norm.eval()(layer(x))
    fold(layer, norm)
    torch.testing.assert_close(layer(x), expected)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


# --- variance --------------------------------------------------------------------------------------------------------


def white(b=16, c=128, side=12):
    return torch.randn(b, c, side, side, generator=torch.Generator().manual_seed(0))


def inside(x, margin):
    """Away from the borders, where padding takes a part of the filters away."""
    return x[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("kind", ["preact", "bottleneck"])
def test_a_branch_keeps_the_variance_of_a_white_input(kind, activation):
    torch.manual_seed(0)
    x = white()
    if kind == "bottleneck":  # its input comes from the activation
        branch = Branch(128, free(activation), kind, expansion=1.0)
        given = ACTIVATIONS[activation]()(x)
    else:
        branch, given = Branch(128, free(activation), kind), x
    with torch.no_grad():
        for layer in convolutions(branch):  # whatever the weights were
            layer.weight.mul_(3.0).add_(0.5)
            layer.bias.zero_()
        out = inside(branch(0.0, given), 3)
    assert float(out.var((0, 2, 3)).mean()) == pytest.approx(1.0, abs=0.06)
    assert float(out.mean((0, 2, 3)).square().mean()) < 0.02


def test_without_scaling_it_does_not():
    torch.manual_seed(0)
    branch = Branch(128, Stack(norm="none", conv="weight-standardized"))
    with torch.no_grad():
        assert float(inside(branch(0.0, white()), 3).var((0, 2, 3)).mean()) < 0.5


def test_each_output_of_a_convolution_of_activated_white_noise_has_variance_one():
    """Not in the mean over channels alone: for every channel, since the inputs are independent."""
    torch.manual_seed(0)
    layer = free().conv_layer(64, 32, 3, activated=True)
    with torch.no_grad():
        out = inside(layer(white(64, 64).relu()) - layer.bias.view(-1, 1, 1), 1)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(32), rtol=0.1, atol=0)
    assert out.mean((0, 2, 3)).abs().max() < 0.05


# --- nets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preact", "basic"])
def test_with_skipinit_a_net_without_norms_begins_as_its_shortcuts(kind):
    net = nets.resnet(14, free(), kind=kind, scale="skipinit", width=4, channels=3, size=(8, 8))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) for m in net.modules())
    blocks = [block for block in net.modules() if isinstance(block, ResidualBlock)]
    skipped = [block for block in blocks if isinstance(block.scale, nn.Parameter)]
    assert len(skipped) == 4
    h = torch.randn(2, 4, 8, 8)
    assert torch.equal(skipped[0](h), skipped[0].post(h))
    nn.functional.cross_entropy(net(torch.randn(2, 3, 8, 8)), torch.tensor([1, 2])).backward()
    assert all(block.scale.grad != 0 for block in skipped)


@pytest.mark.parametrize("time", ["none", "concat", "linear"])
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_in_a_solve_the_gains_get_their_gradients(time, gradient):
    torch.manual_seed(0)
    block = ODEBlock(Branch(4, free("tanh"), time=time), "rk4", steps=16, gradient=gradient).double()
    other = copy.deepcopy(block)
    other.gradient = "backprop"
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for each in (block, other):
        each(x).square().sum().backward()
    for name, parameter in block.named_parameters():
        expected = other.get_parameter(name).grad
        assert expected.norm() > 0
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_they_are_derived_once_a_solve(monkeypatch, solver):
    calls = []
    original = conv.standardize_weight
    monkeypatch.setattr(conv, "standardize_weight", lambda weight: calls.append(1) or original(weight))
    block = ODEBlock(Branch(4, free()), solver, steps=None if solver == "dopri5" else 3)
    block(torch.randn(2, 4, 6, 6))
    assert len(calls) == 2


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_a_net_without_norms_can_be_built_and_trained(net):
    torch.manual_seed(0)
    settings = {"width": 4, "channels": 3, "size": (8, 8), "kind": "preact"}
    model = nets.build(nets.NetConfig(net=net, depth=8, stack=free(), steps=2, scale="skipinit", **settings), 0)
    x, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
