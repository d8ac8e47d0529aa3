"""States along the way of an ODE block, and the way back."""

import math
from itertools import pairwise

import pytest
import torch
from fields import Field, Linear, randn
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput
from resode.layers.context import interval_time
from resode.stack import Dropout, Stack

# --- trajectories ----------------------------------------------------------------------------------------------------


def held(block, x, at):
    """The state after ``at`` of the block's own steps: a shorter block with the same steps."""
    shorter = ODEBlock(block.branch, block.solver, at, t0=0.0, t1=at / block.steps)
    return shorter(x)


@pytest.mark.parametrize("solver", TABLEAUX)
def test_states_on_the_grid_are_those_of_the_solve(solver):
    block, x = ODEBlock(Field(), solver, steps=5), randn(2, 4)
    states = block.trajectory(x, [i / 5 for i in range(6)])
    assert states.shape == (6, 2, 4)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], block(x))
    for i in range(1, 5):
        torch.testing.assert_close(states[i], held(block, x, i), rtol=1e-13, atol=1e-13)
    # whichever other times are asked for
    others = block.trajectory(x, [0.1, 0.2, 0.33, 0.59, 0.6, 0.8, 0.81, 1.0])
    for i, j in ((1, 1), (3, 4), (4, 5), (5, 7)):
        assert torch.equal(others[j], states[i])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("bosh3", 3), ("rk4", 4)])
def test_states_between_grid_points_have_the_solvers_order(solver, order):
    field, x = Linear(), randn(2, 4)
    times = [0.137, 0.5 + 1 / 7, 0.93]
    exact = torch.stack([field.flow(x, t) for t in times])
    errors = [(ODEBlock(field, solver, steps=n).trajectory(x, times) - exact).norm().item() for n in (16, 64, 256)]
    slopes = [math.log(a / b, 4) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.3)


@pytest.mark.parametrize("solver", ["tsit5", "dopri5", "dopri8"])
def test_an_adaptive_trajectory_is_right_at_every_time(solver):
    block, x = ODEBlock(Linear(), solver, rtol=1e-7, atol=1e-7), randn(2, 4)
    times = [0.0, 0.1, 0.3, 0.1 + 0.2, 0.7, 1.0]
    exact = torch.stack([block.branch.flow(x, t) for t in times])
    states = block.trajectory(x, times)
    torch.testing.assert_close(states, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(states[0], x)
    torch.testing.assert_close(states[-1], block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_trajectory_is_differentiable(solver, gradient):
    settings = {"rtol": 1e-8, "atol": 1e-8} if solver == "dopri5" else {"steps": 32}
    block, x = ODEBlock(Linear(), solver, gradient=gradient, **settings), randn(2, 4).requires_grad_()
    times, weights = [0.0, 0.25, 0.4, 1.0], randn(4, 2, 4, seed=5)
    found = torch.autograd.grad((block.trajectory(x, times) * weights).sum(), (x, block.branch.A))
    exact = torch.stack([block.branch.flow(x, t) for t in times])
    expected = torch.autograd.grad((exact * weights).sum(), (x, block.branch.A))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_trajectory_is_one_solve():
    torch.manual_seed(0)
    stack = Stack(norm="none", dropout=Dropout("unit", 0.5), conv="weight-standardized")
    block = ODEBlock(Branch(4, stack, time="concat").double(), "rk4", steps=4, gradient="adjoint")
    x = randn(2, 4, 5, 5)
    torch.manual_seed(3)
    end = block(x)
    torch.manual_seed(3)
    states = block.trajectory(x, [0.25, 0.3, 0.5, 1.0])
    assert torch.equal(states[-1], end), "the same masks throughout"
    assert block.stats.nfe_forward == 4 * (4 + 1)


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "explicit_adams"])
@pytest.mark.parametrize("times", [[], [-0.1], [1.1], [0.5, 0.2], [math.nan], [0.0, math.nan, 1.0]])
def test_times_that_make_no_sense_are_refused(times, solver):
    with pytest.raises(InvalidInput, match=r"lie in \[0, 1\]"):
        ODEBlock(Field(), solver).trajectory(randn(2, 4), times)


def test_a_time_that_misses_its_grid_point_by_rounding_is_on_it():
    block, x = ODEBlock(Field(), "rk4", steps=10), randn(2, 4)
    on = block.trajectory(x, [0.3, 0.7, 1.0])
    cost = block.stats.nfe_forward
    off = block.trajectory(x, [0.3 - 1e-15, 0.7 - 1e-15, 1.0 - 1e-15])
    assert torch.equal(on, off)
    assert block.stats.nfe_forward == cost == 40


def test_times_may_be_a_tensor_and_may_repeat():
    block, x = ODEBlock(Field(), steps=4), randn(2, 4)
    states = block.trajectory(x, torch.tensor([0.25, 0.25, 1.0]))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], block(x))


def test_a_trajectory_of_an_interval_of_ones_own():
    block, x = ODEBlock(Linear(), "rk4", steps=64, t0=2.0, t1=3.0), randn(2, 4)
    states = block.trajectory(x, [2.0, 2.5, 3.0])
    torch.testing.assert_close(states[1], block.branch.flow(x, 0.5), rtol=1e-6, atol=1e-6)
    with pytest.raises(InvalidInput, match=r"\[2, 3\]"):
        block.trajectory(x, [0.5])


# --- inverses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*TABLEAUX, *MULTISTEP])
def test_the_inverse_undoes_the_flow_to_the_order_of_the_solver(solver):
    order = TABLEAUX[solver].order if solver in TABLEAUX else 4
    field, x = Field(), randn(3, 4)
    counts = {1: (64, 128), 2: (32, 64), 3: (16, 32), 4: (32, 64), 5: (8, 16), 8: (3, 6)}[order]
    errors = []
    for steps in counts:
        block = ODEBlock(field, solver, steps=steps)
        errors.append((block.inverse(block(x)) - x).norm().item())
    assert errors[-1] < 0.05
    # There and back again the leading errors of a method of even order cancel (its error changes sign with the step).
    assert math.log2(errors[0] / errors[1]) > order - 0.3


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5", "dopri8"])
def test_the_inverse_is_the_inverse_in_every_mode(solver, gradient):
    settings = {"steps": 64} if solver == "rk4" else {"rtol": 1e-7, "atol": 1e-7}
    block, x = ODEBlock(Field(), solver, t0=-0.25, t1=0.5, gradient=gradient, **settings), randn(3, 4)
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_inverse_is_differentiable(gradient):
    block, y = ODEBlock(Linear(), steps=64, gradient=gradient), randn(3, 4).requires_grad_()
    found = torch.autograd.grad(block.inverse(y).square().sum(), (y, block.branch.A))
    expected = torch.autograd.grad(block.branch.flow(y, -1.0).square().sum(), (y, block.branch.A))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_inverse_uses_the_pieces_in_reverse():
    class Pieces(nn.Module):
        breakpoints = (0.25,)

        def forward(self, t, h):
            return (4.0 if interval_time(t) < 0.25 else -2.0) * h

    x = randn(2, 4)
    for settings in ({"steps": 32}, {"solver": "dopri5", "rtol": 1e-9, "atol": 1e-9}):
        block = ODEBlock(Pieces(), **settings)
        torch.testing.assert_close(block.inverse(x), x * math.exp(-1.0 + 1.5), rtol=1e-5, atol=1e-5)
