"""The ODE block: what it refuses, branches of users, trajectories, extra channels, random ends, inverses, and its life
as an ordinary module."""

import copy
import io
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resode.blocks.branch import Branch
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock, solver_settings
from resode.blocks.residual import ResidualBlock
from resode.blocks.settings import GRADIENTS, SOLVERS
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.dynamics import dynamics
from resode.errors import InvalidInput, SolverError
from resode.layers.context import interval_time
from resode.layers.norm import BatchNorm
from resode.stack import Dropout, Stack


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Field(nn.Module):
    """A user's branch: nothing of ours in it."""

    def __init__(self, c=4):
        super().__init__()
        self.W = nn.Parameter(0.5 * randn(c, c, seed=1))

    def forward(self, t, h):
        return torch.tanh(h @ self.W) * (1.0 + t)


class Linear(nn.Module):
    """dh/dt = A h, whose flow is known."""

    def __init__(self, c=4):
        super().__init__()
        self.A = nn.Parameter(randn(c, c, seed=2))

    def forward(self, t, h):
        return h @ self.A.T

    def flow(self, h, t):
        return h @ torch.linalg.matrix_exp(t * self.A).T


# --- settings that make no sense -------------------------------------------------------------------------------------

LOOSE = {"solver": "dopri5", "rtol": 1e-3}
REFUSALS = [
    ({"solver": "rk45"}, rf"'rk45': choose from {', '.join(SOLVERS)}"),
    ({"gradient": "exact"}, r"'exact': choose from backprop, checkpoint, reversible, adjoint"),
    ({"error_norm": "max"}, r"'max': choose from batch, sample"),
    ({"steps": 0}, r"steps is 0"),
    ({"steps": -1}, r"steps is -1"),
    ({"steps": 2.0}, r"steps is 2\.0: a whole number"),
    ({"steps": True}, r"steps is True: a whole number"),
    ({"solver": "dopri5", "max_steps": 0}, r"max_steps is 0"),
    ({"rtol": 1e-3}, r"rtol is 0\.001, and rk4 makes fixed steps: leave rtol out, .*dopri5"),
    ({"atol": 1e-3}, r"atol is 0\.001, and rk4 makes fixed steps"),
    ({"first_step": 0.1}, r"first_step is 0\.1, and rk4 makes fixed steps"),
    ({"min_step": 0.1}, r"min_step is 0\.1, and rk4 makes fixed steps"),
    ({"solver": "explicit_adams", "rtol": 1e-3}, r"rtol is 0\.001, and explicit_adams makes fixed steps"),
    ({**LOOSE, "steps": 4}, r"rtol is 0\.001, and dopri5 shall make 4 steps: .*without a number of steps"),
    ({"solver": "tsit5", "steps": 4, "min_step": 0.1}, r"min_step is 0\.1, and tsit5 shall make 4 steps"),
    ({"solver": "dopri5", "rtol": 0.0}, r"rtol is 0\.0"),
    ({"solver": "dopri5", "atol": -1e-3}, r"atol is -0\.001"),
    ({"solver": "dopri5", "atol": math.nan}, r"atol is nan"),
    ({"solver": "dopri5", "rtol": math.inf}, r"rtol is inf"),
    ({"solver": "dopri5", "first_step": 0.0}, r"first_step is 0\.0"),
    ({"solver": "dopri5", "min_step": -1.0}, r"min_step is -1\.0"),
    ({"solver": "dopri5", "first_step": 0.1, "min_step": 0.2}, r"first_step is 0\.1, below min_step = 0\.2"),
    ({"t0": 1.0}, r"t0 = 1 to t1 = 1: t1 must be the larger"),
    ({"t0": 2.0, "t1": 1.0}, r"t0 = 2 to t1 = 1"),
    ({"t1": math.inf}, r"t1 = inf"),
    ({"t0": math.nan}, r"t0 = nan"),
    ({"coupling": 0.0}, r"coupling is 0\.0: a number in \(0, 1\]"),
    ({"coupling": 1.01}, r"coupling is 1\.01"),
    ({"coupling": math.nan}, r"coupling is nan"),
    ({"kinetic": -0.1}, r"kinetic is -0\.1: a finite number of at least 0"),
    ({"kinetic": math.inf}, r"kinetic is inf"),
    ({"jacobian": -1.0}, r"jacobian is -1\.0"),
    ({"jacobian": math.nan}, r"jacobian is nan"),
    ({"steer": -0.1}, r"steer is -0\.1"),
    ({"steer": 1.0}, r"steer is 1, and the interval \[0, 1\] is no longer"),
    ({"steer": 0.5, "t0": 0.75}, r"steer is 0\.5, and the interval \[0\.75, 1\]"),
    ({"extra_channels": -1}, r"extra_channels is -1: a whole number of at least 0"),
    ({"extra_channels": 1.5}, r"extra_channels is 1\.5: a whole number"),
    *(
        ({"solver": solver, "gradient": gradient}, rf"gradient='{gradient}' needs a one-step solver, and {solver}")
        for solver in MULTISTEP
        for gradient in ("checkpoint", "reversible")
    ),
    ({"compile": "fast"}, r"'fast': choose from default"),
    ({"mask_intervals": 0}, r"mask_intervals is 0"),
    ({"mask_intervals": 2.5}, r"mask_intervals is 2\.5"),
    ({"knots": 0}, r"knots is 0"),
    ({"knots": -3}, r"knots is -3"),
    ({"steps": 4, "mask_intervals": 3}, r"4 steps .* steps over the breakpoint"),
    ({"steps": 4, "mask_intervals": 4, "steer": 0.1}, r"steer is 0\.1, and f .* jumps at t = 0\.25.*dopri5.*steer=0"),
]
LATE = [r for r in REFUSALS if not {"mask_intervals", "knots", "compile"} & set(r[0])]
"""Those of settings that may be changed on a block."""


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_settings_that_make_no_sense_are_refused_at_once(settings, message):
    with pytest.raises(InvalidInput, match=message):
        ODEBlock(Branch(4), **settings)


@pytest.mark.parametrize(("settings", "message"), LATE)
def test_settings_changed_later_are_refused_when_they_are_used(settings, message):
    block = ODEBlock(Field())
    for name, value in settings.items():
        setattr(block, name, value)
    with pytest.raises(InvalidInput, match=message):
        block(randn(2, 4))


@pytest.mark.parametrize("change", [{"out_channels": 8}, {"stride": 2}])
def test_a_branch_of_ours_that_changes_the_shape_is_refused_at_once(change):
    with pytest.raises(InvalidInput, match="must keep the shape"):
        ODEBlock(Branch(4, **change))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_users_branch_that_changes_the_shape_is_refused_at_its_first_evaluation(solver, gradient):
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.calls = nn.Parameter(torch.ones(1, dtype=torch.float64)), 0

        def forward(self, t, h):
            self.calls += 1
            return self.w * h.mean(1, keepdim=True)  # would broadcast, and be wrong

    block = ODEBlock(Pools(), solver, gradient=gradient)
    with pytest.raises(InvalidInput, match=r"\(3, 4\) into \(3, 1\).*keep the shape"):
        block(randn(3, 4))
    assert block.branch.calls == 1


def test_a_solve_within_a_solve_is_refused():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(ODEBlock(Field()))

        def forward(self, t, h):
            return self.inner(h)

    with pytest.raises(InvalidInput, match="holds an ODE block"):
        ODEBlock(Nested())


def test_a_branch_is_a_module():
    with pytest.raises(InvalidInput, match="the branch is a function"):
        ODEBlock(lambda t, h: -h)


class ChangesItsInput(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(4, 4).double(), nn.ReLU(inplace=True))

    def forward(self, t, h):
        return self.body(h)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "make", [ResidualBlock, ODEBlock, lambda b: ODEBlock(b, "dopri5"), lambda b: ODEBlock(b, gradient="adjoint")]
)
def test_a_branch_that_changes_its_input_in_place_is_refused(make, grad):
    """h + f(h) would be relu(h) + f(h); an activation in place further in does no harm."""
    x = randn(3, 4)
    with torch.set_grad_enabled(grad):
        make(ChangesItsInput(False))(x.clone())
        with pytest.raises(InvalidInput, match="inplace=False"):
            make(ChangesItsInput(True))(x.clone())


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_random_end_and_jumps_go_together_in_adaptive_solves_alone(solver):
    field = Field()
    field.breakpoints = (0.5,)
    if solver == "dopri5":
        ODEBlock(field, solver, steer=0.25)(randn(2, 4))
    for steps in (4, 8):
        with pytest.raises(InvalidInput, match=r"steer is 0\.25, and f .* jumps at t = 0\.5"):
            ODEBlock(field, solver, steps=steps, steer=0.25)


# --- how many steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_number_of_steps_an_embedded_pair_is_adaptive_and_the_others_make_eight(solver):
    block, x = ODEBlock(Clock(), solver), randn(2, 4)
    block(x)
    assert block.grid_steps == (None if solver in ADAPTIVE else 8)
    first = block.stats
    block.steps = 8
    block(x)
    assert (block.stats.accepted, block.stats.rejected) == (8, 0)
    assert (first == block.stats) is (solver not in ADAPTIVE)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_embedded_pair_with_a_number_of_steps_is_its_tableau_on_a_fixed_grid(solver):
    block, x = ODEBlock(Field(), solver, steps=3), randn(2, 4)
    out = block(x)
    assert block.stats.nfe_forward == 3 * TABLEAUX[solver].solution_stages
    with solver_settings(block, steps=5):
        assert not torch.equal(block(x), out)
    assert torch.equal(block(x), out)


# --- branches of users -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_any_module_called_with_time_and_state_is_a_branch(shape, solver, gradient):
    if solver in MULTISTEP and gradient in ("checkpoint", "reversible"):
        return
    tolerances = {"rtol": 1e-4, "atol": 1e-4} if solver in ADAPTIVE else {"steps": 64}
    block = ODEBlock(Linear(), solver, gradient=gradient, **tolerances)
    x = randn(*shape)
    out = block(x)
    assert (out - block.branch.flow(x, 1.0)).norm() < 0.06 * out.norm()
    out.sum().backward()
    assert block.branch.A.grad.norm() > 0


def test_a_branch_may_list_its_breakpoints():
    class Pieces(nn.Module):
        def __init__(self, breakpoints):
            super().__init__()
            self.breakpoints = breakpoints

        def forward(self, t, h):
            return (1.0 if interval_time(t) < 0.25 else -2.0) * h

    x, exact = randn(2, 4), math.exp(0.25 - 1.5)
    for breakpoints in ((0.25,), [0.25], torch.tensor([0.25]), np.array([0.25])):
        branch = Pieces(breakpoints)
        torch.testing.assert_close(ODEBlock(branch, "rk4", steps=32)(x), exact * x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ODEBlock(branch, "dopri5", rtol=1e-8, atol=1e-8)(x), exact * x, rtol=1e-6, atol=1e-6)
        with pytest.raises(InvalidInput, match=r"breakpoint t = 0\.25"):
            ODEBlock(branch, "rk4", steps=3)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_interval_of_integration(solver):
    settings = {"rtol": 1e-9, "atol": 1e-9} if solver == "dopri5" else {"steps": 64}
    block, x = ODEBlock(Linear(), solver, t0=-0.5, t1=0.25, **settings), randn(2, 4)
    torch.testing.assert_close(block(x), block.branch.flow(x, 0.75), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 6), (5, 5)])
def test_a_block_takes_images_of_any_size(size):
    block = ODEBlock(Branch(4, time="concat"), steps=2)
    assert block(torch.randn(2, 4, *size)).shape == (2, 4, *size)


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


class Clock(nn.Module):
    """dh/dt = 1: the flow tells how long it was."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        return torch.ones_like(h)


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


# --- an ordinary module ----------------------------------------------------------------------------------------------


def rich(gradient="adjoint", solver="rk4"):
    """A block with everything that lives in a solve's context."""
    stack = Stack(activation="tanh", conv="weight-standardized", dropout=Dropout("unit", 0.3))
    return ODEBlock(Branch(4, stack, time="concat").double(), solver, steps=3, gradient=gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_deep_copy_between_forward_and_backward_changes_neither(gradient):
    torch.manual_seed(0)
    block, x = rich(gradient), randn(2, 4, 5, 5)
    torch.manual_seed(1)
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    torch.manual_seed(1)
    out = block(x).square().sum()
    twin = copy.deepcopy(block)
    twin(x).sum().backward()
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    found = torch.autograd.grad(out, list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None for p in block.parameters())


def test_an_averaged_model_is_the_average():
    torch.manual_seed(0)
    model = nn.Sequential(rich(), nn.Flatten(), nn.Linear(100, 2).double())
    averaged = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for seed in range(3):
        optimizer.zero_grad()
        model(randn(2, 4, 5, 5, seed=seed)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for p, values in zip(averaged.module.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(values).mean(0))
    assert averaged.eval()(randn(2, 4, 5, 5)).isfinite().all()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_state_dict_and_pickle_round_trip(solver):
    torch.manual_seed(0)
    block, x = rich(solver=solver), randn(2, 4, 5, 5)
    block(x)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    twin = rich(solver=solver)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(block.eval()(x), twin.eval()(x))
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), block(x))


def test_a_block_used_twice_is_two_solves_of_shared_weights():
    torch.manual_seed(0)
    for gradient in GRADIENTS:
        block, x = rich(gradient), randn(2, 4, 5, 5)
        torch.manual_seed(1)
        out = block(block(x)).square().sum()
        found = torch.autograd.grad(out, list(block.parameters()))
        torch.manual_seed(1)
        first, second = copy.deepcopy(block), copy.deepcopy(block)
        again = second(first(x)).square().sum()
        torch.testing.assert_close(out, again)
        parts = [torch.autograd.grad(again, list(b.parameters()), retain_graph=True) for b in (first, second)]
        for f, a, b in zip(found, *parts, strict=True):
            torch.testing.assert_close(f, a + b)
        norm = next(m for m in block.modules() if isinstance(m, BatchNorm))
        assert (norm.num_batches_tracked == 2).all()


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    "settings", [{"solver": "rk4"}, {"solver": "dopri5"}, {"solver": "euler", "extra_channels": 1}]
)
def test_a_block_on_a_fixed_grid_is_exported_as_its_steps(settings, norm):
    torch.manual_seed(0)
    branch = Branch(3 + settings.get("extra_channels", 0), Stack(norm=norm), time="concat")
    block = ODEBlock(branch, steps=2, **settings).eval()
    batches = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(block, (torch.randn(2, 3, 6, 6),), dynamic_shapes=batches).module()
    for batch in (2, 5):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(exported(x), block(x))


def test_an_adaptive_block_is_not_exported():
    block = ODEBlock(Branch(3, time="concat"), "dopri5").eval()
    with pytest.raises(InvalidInput, match=r"dopri5 chooses its steps by the values it meets.*solver_settings"):
        torch.export.export(block, (torch.randn(2, 3, 6, 6),))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_torch_compile_changes_nothing(gradient, monkeypatch):
    """Two norms and two convolutions in a branch, and two steps: none is taken for the other. (With the backend that
    makes no code, which takes seconds.)"""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = Stack(conv="weight-standardized", dropout=Dropout("unit", 0.3))
    block = ODEBlock(Branch(4, stack, time="concat").double(), "heun", steps=2, gradient=gradient)
    twin, x = copy.deepcopy(block), randn(3, 4, 5, 5)
    compiled = torch.compile(block)
    for seed in (1, 2):  # the second solve has masks and weights of its own
        for module, run in ((block, compiled), (twin, twin)):
            torch.manual_seed(seed)
            module.zero_grad()
            run(x).square().sum().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(p.grad, alpha=-1e-3)
    for a, b in zip(block.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    block.eval(), twin.eval()
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()


def test_two_branches_one_block_each_in_a_net_have_stats_of_their_own():
    net = nn.Sequential(ODEBlock(Field(), "euler", steps=3), ODEBlock(Field(), "rk4", steps=2))
    net(randn(2, 4))
    assert [block.stats.nfe_forward for block in net] == [3, 8]


def test_a_block_follows_to_and_train():
    block = ODEBlock(Branch(4, time="film"), steps=2).double()
    assert block(randn(2, 4, 5, 5)).dtype == torch.float64
    assert not block.eval().branch.training


def test_a_euler_step_is_a_residual_block():
    field, x = Field(), randn(2, 4)
    torch.testing.assert_close(ODEBlock(field, "euler", steps=1)(x), ResidualBlock(field, t=0.0)(x))


def test_repr_says_the_settings_in_force():
    assert "solver='rk4', steps=3, t0=0, t1=2, gradient='adjoint'" in repr(
        ODEBlock(Field(), steps=3, t1=2.0, gradient="adjoint")
    )
    adaptive = repr(ODEBlock(Field(), "dopri5", rtol=1e-4, atol=1e-6))
    assert "solver='dopri5', rtol=0.0001, atol=1e-06" in adaptive
    assert "steps" not in adaptive


# --- solver_settings -------------------------------------------------------------------------------------------------

NAMES = ("solver", "steps", "rtol", "atol", "gradient", "max_steps", "first_step", "min_step", "error_norm")


def settings_of(model):
    return [{n: getattr(b, n) for n in NAMES} for b in model.modules() if isinstance(b, ODEBlock)]


def test_solver_settings_hold_for_a_while_in_every_block():
    model = nn.Sequential(ODEBlock(Linear(), "euler", 3), nn.Sequential(ODEBlock(Linear(), "dopri5", rtol=1e-2)))
    before, x = settings_of(model), randn(2, 4)
    with solver_settings(model, solver="rk4", steps=64):
        assert all((b["solver"], b["steps"]) == ("rk4", 64) for b in settings_of(model))
        expected = model[1][0].branch.flow(model[0].branch.flow(x, 1.0), 1.0)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert settings_of(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_solver_settings_are_restored_after_an_error(error):
    model = nn.Sequential(ODEBlock(Linear(), "euler", 3), ODEBlock(Linear(), "dopri5", rtol=1e-2))
    before = settings_of(model)
    with pytest.raises(error), solver_settings(model, solver="rk4", steps=64):
        raise error
    assert settings_of(model) == before
    with pytest.raises(InvalidInput), solver_settings(model, solver="rk4", steps=0, rtol=None, atol=None):
        model(randn(2, 4))
    assert settings_of(model) == before


def test_solver_settings_nest():
    block = ODEBlock(Linear(), "euler", 3)
    with solver_settings(block, steps=5):
        with solver_settings(block, solver="heun"):
            assert (block.solver, block.steps) == ("heun", 5)
        assert (block.solver, block.steps) == ("euler", 5)
    assert (block.solver, block.steps) == ("euler", 3)


EXACT = {"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}
KINDS = {
    "fixed": {"solver": "rk4", "steps": 64},
    "pair on a grid": {"solver": "dopri5", "steps": 16},
    "adaptive": {**EXACT, "first_step": 0.1, "min_step": 1e-6, "error_norm": "sample", "max_steps": 500},
    "multistep": {"solver": "explicit_adams", "steps": 64},
}


@pytest.mark.parametrize("later", KINDS)
@pytest.mark.parametrize("trained", KINDS)
def test_solver_settings_go_from_any_kind_of_solve_to_any_other_and_back(trained, later):
    block, x = ODEBlock(Linear(), **KINDS[trained]), randn(2, 4)
    before, out = settings_of(block), block(x)
    with solver_settings(block, **KINDS[later]):
        torch.testing.assert_close(block(x), block.branch.flow(x, 1.0), rtol=1e-4, atol=1e-4)
        assert {name: getattr(block, name) for name in KINDS[later]} == KINDS[later]
        assert (block.grid_steps is None) is (later == "adaptive")
    assert settings_of(block) == before
    assert torch.equal(block(x), out)


def test_a_solver_that_is_named_alone_chooses_its_steps_as_a_new_block_does():
    fixed, adaptive = ODEBlock(Linear(), "rk4", steps=3), ODEBlock(Linear(), **EXACT)
    with solver_settings(fixed, solver="tsit5"):
        assert (fixed.grid_steps, fixed.steps) == (None, None)
    with solver_settings(adaptive, solver="heun"):
        assert (adaptive.grid_steps, adaptive.rtol) == (8, None)
    with solver_settings(adaptive, solver="bosh3"):
        assert (adaptive.grid_steps, adaptive.rtol, adaptive.atol) == (None, 1e-8, 1e-8)
    with solver_settings(adaptive, steps=5):
        assert (adaptive.grid_steps, adaptive.solver, adaptive.rtol) == (5, "dopri5", None)
    with solver_settings(fixed, steps=5):
        assert (fixed.grid_steps, fixed.solver) == (5, "rk4")


@pytest.mark.parametrize("name", ["t0", "branch", "tolerance"])
def test_an_unknown_setting_is_refused_before_anything_changes(name):
    block = ODEBlock(Linear(), "euler", 3)
    with (
        pytest.raises(InvalidInput, match=f"'{name}': choose from solver, steps, rtol, atol, gradient"),
        solver_settings(block, steps=5, **{name: 1}),
    ):
        pass
    assert block.steps == 3


def test_tolerances_default_to_a_thousandth():
    x, costs = randn(2, 4), []
    for settings in ({}, {"rtol": 1e-3}, {"rtol": 1e-3, "atol": 1e-3}, {"rtol": 1e-9, "atol": 1e-9}):
        block = ODEBlock(Linear(), "dopri5", **settings)
        block(x)
        costs.append(block.stats.nfe_forward)
    assert costs[0] == costs[1] == costs[2] < costs[3]


def test_a_failed_solve_is_an_error_of_its_kind():
    class Explodes(nn.Module):
        def forward(self, t, h):
            return h**2

    with pytest.raises(SolverError):
        ODEBlock(Explodes(), "dopri5", t1=5.0)(torch.ones(1, 1))
    with pytest.raises(ArithmeticError):
        ODEBlock(Explodes(), "dopri5", t1=5.0)(torch.ones(1, 1))
