"""The fidelity meter: what it says of each mode, and that it leaves everything as it was."""

import copy
import json
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from resode import Branch, Dropout, InvalidInput, ODEBlock, Stack
from resode.blocks import GRADIENTS, TABLEAUX, collect_penalties
from resode.blocks.fidelity import FIDELITY_TOLERANCE, Agreement, Fidelity, gradient_fidelity


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Smooth(nn.Module):
    """f(t, h) = ½ tanh(h W) V (1 + t²)"""

    def __init__(self, c=4):
        super().__init__()
        self.W, self.V = nn.Parameter(randn(c, c, seed=1)), nn.Parameter(randn(c, c, seed=2))

    def forward(self, t, h):
        return 0.5 * torch.tanh(h @ self.W) @ self.V * (1.0 + t**2)


X = randn(3, 4)


def convolutional(seed=0, norm="batch", p=0.0, **settings):
    """A block of a branch as in our nets, in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branch = Branch(8, Stack(norm=norm, dropout=Dropout(p=p)), "preact")
        for weight in branch.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight, mode="fan_out")
    return ODEBlock(branch, **settings)


# What it says


@pytest.mark.parametrize("settings", [{}, {"solver": "dopri5"}, {"solver": "explicit_adams"}])
def test_backpropagation_agrees_with_itself_exactly(settings):
    found = gradient_fidelity(ODEBlock(Smooth(), **settings), X)
    assert found.mode == "backprop"
    assert set(found.parameters) == {"branch.W", "branch.V"}
    assert found.worst[1] == 0.0
    assert found.input.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.reconstruction_error is None


@pytest.mark.parametrize("solver", TABLEAUX)
def test_checkpoints_agree_with_backpropagation_to_rounding(solver):
    found = gradient_fidelity(ODEBlock(Smooth(), solver, gradient="checkpoint"), X)
    assert found.worst[1] < 1e-12
    assert found.reconstruction_error is None


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_errors_of_the_other_modes_fall_at_the_order_of_the_tableau(solver, gradient):
    coarse, fine = (gradient_fidelity(ODEBlock(Smooth(), solver, n, gradient=gradient), X) for n in (16, 64))
    order, found = TABLEAUX[solver].order, math.log(coarse.worst[1] / fine.worst[1], 4)
    # A reversible solve may be nearer the tableau's than the tableau's is to the flow.
    assert order - 0.3 < found < order + (0.3 if gradient == "adjoint" else 1.3)
    assert math.log(coarse.input.relative_error / fine.input.relative_error, 4) > order - 0.3
    assert all(found.cosine > 0.999 for found in fine.parameters.values())


@pytest.mark.parametrize("settings", [{"solver": "rk4"}, {"solver": "dopri5"}, {"solver": "euler", "coupling": 0.9}])
def test_a_reversible_solve_is_exact_for_its_own_scheme_and_comes_back(settings):
    block = ODEBlock(Smooth(), gradient="reversible", **settings)
    found = gradient_fidelity(block, X, own_scheme=True)
    assert found.worst[1] < 1e-12
    assert found.reconstruction_error < 1e-12
    # A hundred times what rounding makes of it, at the least: dopri5 and its reversible form are near the flow both.
    assert gradient_fidelity(block, X).worst[1] > 1e-10, "backpropagation through the tableau is of another solve"


def test_an_adjoint_comes_back_to_x_at_the_order_of_the_solver():
    errors = [
        gradient_fidelity(ODEBlock(Smooth(), "euler", n, gradient="adjoint"), X).reconstruction_error for n in (16, 64)
    ]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(1.0, abs=0.1)


def test_an_adjoint_with_ordinary_tolerances_is_off_by_about_a_percent():
    def worst(tolerance):
        block = convolutional(solver="bosh3", rtol=tolerance, atol=tolerance, gradient="adjoint", norm="group")
        return gradient_fidelity(block, randn(8, 8, 8, 8, dtype=torch.float32)).worst[1]

    assert 0.5 * FIDELITY_TOLERANCE < worst(1e-3) < 10 * FIDELITY_TOLERANCE
    assert worst(1e-6) < FIDELITY_TOLERANCE


def test_it_is_the_distance_of_the_gradients_themselves():
    """As computed by hand from two blocks."""
    v, gradients = randn(3, 4, seed=7), {}
    for gradient in ("adjoint", "backprop"):
        block, x = ODEBlock(Smooth(), "midpoint", 3, gradient=gradient), X.clone().requires_grad_()
        (v * block(x)).sum().backward()
        gradients[gradient] = {"input": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    found = gradient_fidelity(ODEBlock(Smooth(), "midpoint", 3, gradient="adjoint"), X, v)
    for name, g in gradients["adjoint"].items():
        exact, said = gradients["backprop"][name], found.input if name == "input" else found.parameters[name]
        assert said.relative_error == pytest.approx(float((g - exact).norm() / exact.norm()), rel=1e-10)
        assert said.cosine == pytest.approx(float((g * exact).sum() / g.norm() / exact.norm()), rel=1e-10)
    name, error = found.worst
    assert error == max(found.input.relative_error, *(one.relative_error for one in found.parameters.values()))
    assert error == found.parameters[name].relative_error


def test_a_zero_gradient_agrees_with_a_zero_gradient():
    block = ODEBlock(Smooth(), "midpoint", gradient="adjoint")
    found = gradient_fidelity(block, X, torch.zeros_like(X))
    assert {found.input, *found.parameters.values()} == {Agreement(1.0, 0.0)}


def test_rounding_where_a_gradient_is_zero_is_no_error():
    """A bias before a batch norm has none, and what comes out for it is rounding in every mode."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(4, 4)

        def forward(self, t, h):
            return torch.tanh(self.norm(self.conv(h)))

    torch.manual_seed(0)
    block = ODEBlock(Shifted(), "rk4", 32, gradient="adjoint")
    found = gradient_fidelity(block, randn(4, 4, 8, 8, dtype=torch.float32))
    assert found.parameters["branch.conv.bias"].relative_error < 1e-2
    assert found.parameters["branch.conv.bias"].cosine == 1.0


def test_a_frozen_parameter_has_no_gradient_to_compare():
    field = Smooth()
    field.V.requires_grad_(False)
    assert set(gradient_fidelity(ODEBlock(field, gradient="adjoint"), X).parameters) == {"branch.W"}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_extra_channels_are_part_of_the_state_that_is_reconstructed(gradient):
    found = gradient_fidelity(ODEBlock(Smooth(6), "rk4", 32, gradient=gradient, extra_channels=2), X)
    assert found.worst[1] < 1e-4
    assert (found.reconstruction_error or 0.0) < 1e-6


# The same problem in both


@pytest.mark.parametrize("settings", [{"steps": 16}, {"steps": 16, "mask_intervals": 4}, {"steps": 16, "steer": 0.5}])
def test_masks_moments_and_random_ends_are_the_same_in_both(settings):
    """With masks of their own the two would be strangers."""
    block = convolutional(p=0.3, solver="rk4", gradient="checkpoint", **settings).double()
    x = randn(4, 8, 6, 6)
    assert gradient_fidelity(block, x).worst[1] < 1e-10
    block.gradient = "adjoint"
    assert gradient_fidelity(block, x).worst[1] < 0.1


# Nothing is touched


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_block_buffers_gradients_stats_and_random_state_are_left_as_they_were(gradient):
    block = convolutional(p=0.3, solver="midpoint", steps=2, gradient=gradient, kinetic=1.0, compile=True)
    x = randn(4, 8, 6, 6, dtype=torch.float32).requires_grad_()
    block.stats.nfe_forward = 77
    for p in block.parameters():
        p.grad = torch.full_like(p, 3.0)
    before, modes = copy.deepcopy(block.state_dict()), [module.training for module in block.modules()]
    torch.manual_seed(5)
    state, stats = torch.get_rng_state(), block.stats
    with collect_penalties() as penalties, torch.no_grad():
        gradient_fidelity(block, x)
    assert penalties == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in block.parameters())
    assert x.grad is None
    assert block.stats is stats
    assert stats.nfe_forward == 77
    assert [module.training for module in block.modules()] == modes
    assert (block.gradient, block.compile_mode, block.kinetic) == (gradient, "default", 1.0)


# What is handed over


def test_a_fidelity_survives_json_and_cannot_be_changed():
    for gradient in ("backprop", "adjoint"):
        found = gradient_fidelity(ODEBlock(Smooth(), "euler", 4, gradient=gradient), X)
        assert Fidelity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(FrozenInstanceError):
        found.mode = "backprop"


def test_a_gradient_that_is_not_a_number_is_the_worst():
    found = Fidelity("adjoint", {"a": Agreement(0.0, 5.0), "b": Agreement(0.0, math.nan)}, Agreement(1.0, 0.0), None)
    assert found.worst[0] == "b"


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InvalidInput, match="of an ODE block, and this is a Smooth"):
        gradient_fidelity(Smooth(), X)
    with pytest.raises(InvalidInput, match=r"the cotangent has the shape \(4,\).*\(3, 4\)"):
        gradient_fidelity(ODEBlock(Smooth()), X, randn(4))
