"""What an ODE block does besides solving: extra channels, and random ends."""

import math

import pytest
import torch
from fields import Clock, Linear, randn
from torch import nn

from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.tableaux import TABLEAUX
from resode.dynamics import dynamics
from resode.errors import InvalidInput
from resode.layers.context import interval_time

# --- extra channels --------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A field of 4 channels that mixes them, for vectors and images."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.5 * randn(4, 4, seed=1))

    def forward(self, t, h):
        return torch.tanh(torch.einsum("bc...,cd->bd...", h, self.W)) * (1.0 + t)


def padded(x, extra):
    return torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 5)])
@pytest.mark.parametrize("settings", [{"steps": 3}, {"solver": "dopri5"}, {"solver": "explicit_adams", "steps": 6}])
def test_extra_channels_are_zeros_that_are_integrated_along_and_left_out(settings, shape, gradient):
    if settings.get("solver") in MULTISTEP and gradient in ("checkpoint", "reversible"):
        return
    field, x = Wide(), randn(*shape).requires_grad_()
    block = ODEBlock(field, extra_channels=2, gradient=gradient, **settings)
    plain = ODEBlock(field, gradient=gradient, **settings)
    out = block(x)
    assert out.shape == x.shape
    expected = plain(padded(x, 2))[:, :2]
    assert torch.equal(out, expected)
    weights = randn(*shape, seed=4)
    found = torch.autograd.grad((out * weights).sum(), (x, field.W))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, field.W))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert block.stats == plain.stats


def test_a_state_without_channels_has_no_extra_ones():
    with pytest.raises(InvalidInput, match=r"\(B, C, …\), and this one has the shape \(3,\)"):
        ODEBlock(Wide(), extra_channels=1)(randn(3))


def test_extra_channels_change_the_flow():
    """In one dimension trajectories keep their order; with a second they may pass each other (Dupont et al. 2019)."""

    class Rotation(nn.Module):
        def forward(self, t, h):
            return math.pi * torch.stack([-h[:, 1], h[:, 0]], 1)

    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(ODEBlock(Rotation(), steps=32, extra_channels=1)(x), -x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "explicit_adams"])
def test_a_trajectory_has_the_extra_channels_and_the_inverse_takes_them(solver):
    settings = {"rtol": 1e-9, "atol": 1e-9} if solver == "dopri5" else {"steps": 64}
    block, x = ODEBlock(Wide(), solver, extra_channels=2, **settings), randn(3, 2)
    states = block.trajectory(x, [0.0, 0.5, 1.0])
    assert torch.equal(states[0], padded(x, 2))
    torch.testing.assert_close(states[-1][:, :2], block(x), rtol=1e-6, atol=1e-6)
    assert states[-1][:, 2:].abs().min() > 1e-3
    torch.testing.assert_close(block.inverse(states[-1]), padded(x, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_view_of_a_block_with_extra_channels_is_the_block(solver):
    block, x = ODEBlock(Wide(), solver, steps=4, extra_channels=2), randn(3, 2)
    view = dynamics(block, x)
    assert [step.kind for step in view.steps] == ["transition", *["residual"] * 4, "transition"]
    torch.testing.assert_close(view(x), block(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(view.run(x, 0, 3), block.trajectory(x, [0.5])[0], rtol=1e-13, atol=1e-13)


# --- random ends -----------------------------------------------------------------------------------------------------


def ends(block, n):
    return torch.tensor([block(torch.zeros(1, 1, dtype=torch.float64)).item() for _ in range(n)]) + block.t0


@pytest.mark.parametrize("settings", [{"steps": 2}, {"solver": "dopri5"}, {"solver": "explicit_adams", "steps": 4}])
def test_in_training_the_end_is_uniform_about_t1(settings):
    torch.manual_seed(0)
    n, steer = 300, 0.4
    found = ends(ODEBlock(Clock(), t0=-0.5, t1=1.0, steer=steer, **settings), n).sort().values
    assert found[0] >= 1.0 - steer - 1e-9
    assert found[-1] <= 1.0 + steer + 1e-9
    # Kolmogorov and Smirnov's statistic exceeds 1.95/√n once in a thousand samples of a uniform distribution.
    quantiles = (found - (1.0 - steer)) / (2.0 * steer)
    assert (quantiles - torch.arange(n) / n).abs().max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("settings", [{"steps": 2}, {"solver": "dopri5"}])
def test_in_evaluation_the_end_is_t1_and_nothing_is_drawn(settings):
    block = ODEBlock(Clock(), t1=1.25, steer=0.4, **settings).eval()
    state = torch.get_rng_state()
    assert ends(block, 3).tolist() == pytest.approx([1.25] * 3, abs=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_random_end_nothing_is_drawn_in_training():
    state = torch.get_rng_state()
    ODEBlock(Clock())(torch.zeros(1, 1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("settings", [{"steps": 32}, {"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}])
def test_the_gradient_is_that_of_the_solve_to_the_end_that_was_drawn(settings, gradient):
    block, x = ODEBlock(Linear(), steer=0.5, gradient=gradient, **settings), randn(2, 4).requires_grad_()
    torch.manual_seed(7)
    found = torch.autograd.grad(block(x).square().sum(), (x, block.branch.A))
    torch.manual_seed(7)
    end = 1.0 + 0.5 * (2.0 * float(torch.rand(())) - 1.0)
    expected = torch.autograd.grad(block.branch.flow(x, end).square().sum(), (x, block.branch.A))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_random_end_lands_on_breakpoints_all_the_same():
    class Jumps(Clock):
        def forward(self, t, h):
            return torch.full_like(h, 1.0 if interval_time(t) < 0.5 else 3.0)

    torch.manual_seed(0)
    block = ODEBlock(Jumps(breakpoints=(0.5,)), "dopri5", steer=0.4)
    found = (ends(block, 20) - 0.5) / 3.0 + 0.5  # the time at which the solve ended
    assert ((found > 0.6 - 1e-9) & (found < 1.4 + 1e-9)).all()
    assert found.std() > 0.1


def test_trajectories_and_inverses_know_no_random_end():
    block = ODEBlock(Clock(), steps=2, steer=0.4)
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert block.trajectory(x, [1.0]).item() == pytest.approx(1.0)
    assert block.inverse(x).item() == pytest.approx(-1.0)
