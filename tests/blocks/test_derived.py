"""Branches made of another: scaled, varying, held, frozen; and what tells two branches apart."""

import copy
import re

import pytest
import torch
from torch import nn

from resode import Branch, Dropout, ODEBlock, ResidualBlock, Stack
from resode.blocks import TIMES, ProjectedODE
from resode.blocks.alike import difference
from resode.blocks.derived import Gain, Held, Scaled, Varying, frozen
from resode.blocks.varying import stack_parameters
from resode.layers import BatchNorm
from resode.layers.basis import BASES, Basis
from resode.train.sparsity import factorize


class Wave(nn.Module):
    """f(t, h) = sin(h W + t), with a weight that may stand in two places."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=generator))

    def forward(self, t, h):
        return torch.sin(h @ self.weight + t)


def states(count=5):
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def varying(kind, count=3):
    basis = Basis(kind, count)
    return Varying(stack_parameters([Wave(s) for s in range(count)], count), basis)


def scaled(kind):
    gains = [Gain(2.0, nn.Parameter(torch.tensor(w, dtype=torch.float64))) for w in (0.5, -1.0, 2.0)]
    return Scaled(varying(kind), stack_parameters(gains, 3), Basis(kind, 3))


WEIGHT = {("constant", 0.5): (0, 1, 0), ("linear", 0.5): (0, 1, 0), ("linear", 0.25): (0.5, 0.5, 0)}


@pytest.mark.parametrize(("kind", "t"), WEIGHT)
def test_parameters_and_scale_are_those_of_their_time(kind, t):
    branch, h = scaled(kind), states()
    shares = WEIGHT[kind, t]
    W = sum(share * Wave(s).weight for s, share in enumerate(shares))
    alpha = 2.0 * sum(share * w for share, w in zip(shares, (0.5, -1.0, 2.0), strict=True))
    torch.testing.assert_close(branch(t, h), alpha * torch.sin(h @ W + t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frozen(branch, t)(t, h), branch(t, h), rtol=1e-12, atol=1e-12)
    assert branch.breakpoints == ((1 / 3, 2 / 3) if kind == "constant" else (0.5,))


def test_spans_and_breakpoints_are_handed_on():
    block = ODEBlock(scaled("constant"), "euler", 3, t0=1.0, t1=4.0)
    assert block.breakpoints == (2.0, 3.0)
    assert block.branch.branch.layers.basis == block.branch.gain.basis == Basis("constant", 3, 1.0, 4.0)
    assert Scaled(Wave(), Gain(3.0)).breakpoints == ()
    Scaled(Wave(), Gain(3.0)).set_span(0.0, 2.0)


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible", "adjoint"])
def test_all_gradient_modes_find_their_parameters(gradient):
    x = states()
    found = []
    for mode in ("backprop", gradient):
        block = ODEBlock(scaled("linear"), "rk4", 16, gradient=mode)
        block(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    assert len(found[0]) == 3 * 16 + 3
    assert float((found[1] - found[0]).norm() / found[0].norm()) < (1e-12 if gradient == "checkpoint" else 1e-3)


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_traced_steps_are_the_steps(kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    found, x = [], states()
    for traced in (False, True):
        net = nn.Sequential(ODEBlock(Scaled(Held(Wave(), 0.4), Gain(0.5)), "rk4", 6, compile=traced))
        net.append(ProjectedODE(scaled(kind), nn.ReLU(), 6, compile=traced))
        for _ in range(2):
            net.zero_grad()
            out = net(x)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def test_a_held_branch_does_not_know_the_time():
    branch, h = Held(Wave(), 0.3), states()
    assert torch.equal(branch(0.9, h), branch.branch(0.3, h))
    assert torch.equal(ResidualBlock(branch, t=0.9)(h), h + branch.branch(0.3, h))


def test_modes_are_those_of_the_branch():
    for make in (lambda b: Scaled(b, Gain(2.0)), lambda b: Varying(b, Basis("constant", 1)), lambda b: Held(b, 0.0)):
        for mode in (True, False):
            assert {module.training for module in make(Wave().train(mode)).modules()} == {mode}


@pytest.mark.parametrize("time", TIMES)
def test_a_frozen_branch_is_the_branch_at_its_time_and_no_other(time):
    torch.manual_seed(0)
    branch = Branch(4, Stack(), "preact", time).double().eval()
    norms = [layer for layer in branch.modules() if isinstance(layer, BatchNorm)]
    for norm in norms:
        norm.set_knots((0.0, 0.5, 1.0))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    h, before = torch.randn(2, 4, 5, 5, dtype=torch.float64), copy.deepcopy(branch.state_dict())
    made = frozen(branch, 0.6)
    out = ResidualBlock(made, t=0.6)(h)
    torch.testing.assert_close(out, ResidualBlock(branch, t=0.6)(h), rtol=1e-12, atol=1e-12)
    assert all(p.ndim < 5 for p in made.parameters())
    assert {layer.running_mean.ndim for layer in made.modules() if isinstance(layer, BatchNorm)} == {1}
    if time not in ("concat", "film"):
        torch.testing.assert_close(made(0.1, h), made(0.6, h))
        assert made.time == "none"
    # The branch is as it was, and shares nothing with what was made of it.
    assert all(torch.equal(value, before[key]) for key, value in branch.state_dict().items())
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in branch.parameters()}


@pytest.mark.parametrize("time", BASES)
def test_products_of_factors_are_frozen_as_the_product_at_the_time(time):
    torch.manual_seed(0)
    branch, h = Branch(4, Stack(norm="group"), time=time, knots=3).double(), torch.randn(2, 4, 5, 5).double()
    factorize(branch)
    with torch.no_grad():
        for p in branch.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    names = {name for name, _ in branch.named_parameters()}
    made = frozen(branch, 0.3)
    torch.testing.assert_close(made(0.3, h), branch(0.3, h), rtol=1e-12, atol=1e-12)
    assert {name for name, _ in branch.named_parameters()} == names


def test_a_piece_is_chosen_by_a_time_inside_it():
    branch = varying("constant", 2)
    for inside, seed in ((0.25, 0), (0.75, 1), (None, 1)):
        assert torch.equal(frozen(branch, 0.5, inside).layers[0].weight, Wave(seed).weight)


def test_a_frozen_parameter_is_trained_if_its_values_were():
    branch = varying("linear")
    branch.layers[0].weight.requires_grad_(False)
    assert not frozen(branch, 0.3).layers[0].weight.requires_grad
    assert frozen(varying("linear"), 0.3).layers[0].weight.requires_grad


def test_a_parameter_in_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.one = Wave(seed)
            self.other = Wave(seed)
            self.other.weight = self.one.weight

        def forward(self, t, h):
            return self.one(t, self.other(t, h))

    branch, h = Varying(stack_parameters([Twice(0), Twice(1)], 2), Basis("linear", 2)), states()
    made = frozen(branch, 0.25)
    assert made.layers[0].one.weight is made.layers[0].other.weight
    torch.testing.assert_close(made(0.25, h), branch(0.25, h), rtol=1e-12, atol=1e-12)


# What tells branches apart


def test_branches_that_differ_in_values_alone_are_alike():
    for kind in ("basic", "preact", "convnext"):
        one, other = Branch(4, kind=kind), Branch(4, kind=kind).eval()
        assert difference(one, other) is None
    for norm in (layer for layer in other.modules() if isinstance(layer, BatchNorm)):
        norm.running_mean += 1.0
    assert difference(one, other) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Branch(4, Stack(norm="group")), "BatchNorm.* differ in class: the other is a GroupNorm"),
        (lambda: Branch(4, Stack(activation="elu")), "ReLU.* differ in class: the other is a ELU"),
        (lambda: Branch(4, kind="basic"), "their modules are"),
        (lambda: Branch(4, time="film"), "their modules are"),
        (lambda: Branch(4, time="concat"), "differ in time: none and concat"),
        (lambda: Branch(4, expansion=2), r"layers\.2 \(Conv2d\) differ in out_channels: 4 and 8"),
        (lambda: Branch(4, Stack(conv="weight-standardized")), "differ in standardized: False and True"),
    ],
)
def test_other_layers_settings_and_shapes_are_named(make, says):
    found = difference(Branch(4), make())
    assert found is not None
    assert re.search(says, found), found


def test_the_place_of_a_block_tells_it_apart_in_our_own_layers_alone():
    one, other = (Branch(4, Stack(dropout=Dropout(p=p))) for p in (0.1, 0.2))
    assert difference(ResidualBlock(one, t=0.0), ResidualBlock(other, t=0.5)) is None
    one, other = Wave(), Wave()
    one.p, other.p = 2, 3  # of a norm, say
    assert difference(one, other) == "they (Wave) differ in p: 2 and 3"


def test_parameters_and_buffers_are_compared_by_shape_and_value():
    one, other = Wave(), Wave()
    other.weight = nn.Parameter(torch.zeros(4, 3))
    assert "shapes of parameters" in difference(one, other)
    one.register_buffer("shift", torch.tensor(1.0))
    other = copy.deepcopy(one)
    assert difference(one, other) is None
    other.shift += 1.0
    assert "the buffer shift" in difference(one, other)
