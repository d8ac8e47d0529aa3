"""Adams methods on a fixed grid: order, breakpoints, counts, gradients, and what they refuse."""

import math
import warnings

import numpy as np
import pytest
import torch
from fields import Function
from scipy.special import ellipj
from torch import nn

from resode.blocks.multistep import MULTISTEP, MultistepGrid
from resode.blocks.ode import ODEBlock
from resode.errors import InvalidInput
from resode.layers.context import interval_time
from resode.layers.norm import BatchNorm


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        A = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.A = nn.Parameter(0.5 * A)

    def forward(self, t, h):
        return (0.5 + t) * h @ self.A.T

    def flow(self, h, t=1.0):
        return h @ torch.linalg.matrix_exp(0.5 * (t + t * t) * self.A).T


def state(seed=0):
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ONE = torch.ones(1, 1, dtype=torch.float64)
ALL = pytest.mark.parametrize("solver", MULTISTEP)


def rigid_body(t, h):
    """Euler's equations: h = (sn τ, cn τ, dn τ), Jacobi's elliptic functions with m = 0.51, at τ = t + t²/2."""
    a, b, c = h.unbind(-1)
    return (1.0 + t) * torch.stack([b * c, -a * c, -0.51 * a * b], -1)


@ALL
def test_the_error_falls_with_order_four(solver):
    counts, exact = (16, 32, 64, 128), np.array(ellipj(1.5, 0.51)[:3])
    errors = []
    for steps in counts:
        out = ODEBlock(Function(rigid_body), solver, steps)(torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64))
        errors.append(np.linalg.norm(out.numpy() - exact))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(4.0, abs=0.1)


@ALL
def test_refining_the_grid_ends_in_the_solution_and_not_in_an_instability(solver):
    """Adams methods of order 12 grow without bound here at every number of steps up to 256."""
    block = ODEBlock(Function(lambda t, h: -5.0 * h), solver, steps=256)
    assert block(ONE).item() == pytest.approx(math.exp(-5.0), rel=1e-6)


@ALL
def test_the_order_survives_a_jump_on_the_grid(solver):
    """The history of slopes is of no use on the other side of a jump: the solve begins anew there."""
    counts, errors = (64, 128, 256), []
    for steps in counts:
        block = ODEBlock(
            Function(lambda t, h: (-3.0 if interval_time(t) > 0.5 else 1.0) * h, breakpoints=(0.5,)), solver, steps
        )
        errors.append(abs(block(ONE).item() - math.exp(0.5 - 1.5)))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(4.0, abs=0.3)


@ALL
def test_a_grid_that_steps_over_a_breakpoint_is_refused(solver):
    field = Function(lambda t, h: -h, breakpoints=(0.25,))
    ODEBlock(field, solver, steps=4)
    with pytest.raises(InvalidInput, match=r"6 steps from 0 to 1 .*t = 0\.25"):
        ODEBlock(field, solver, steps=6)


def test_the_grid_is_cut_at_the_breakpoints_inside():
    grid = tuple(i / 8 for i in range(9))
    assert MultistepGrid("explicit_adams", grid).pieces() == [grid]
    scheme = MultistepGrid("explicit_adams", grid, (0.0, 0.25, 0.5 + 1e-12, 1.0, 7.0))
    assert scheme.pieces() == [grid[:3], grid[2:5], grid[4:]]
    assert scheme.reversed().pieces() == [grid[:3:-1], grid[4:1:-1], grid[2::-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.1, 0.7), (-0.3, 0.1)])
@ALL
def test_f_is_evaluated_from_end_to_end_and_never_beyond(solver, t0, t1, dtype):
    """0.1 and 0.7 rounded to single precision lie above and below themselves."""
    block = ODEBlock(Function(lambda t, h: 0.5 * torch.tanh(h)), solver, steps=13, t0=t0, t1=t1)
    x = torch.linspace(-1.0, 1.0, 5, dtype=dtype).view(1, 5)
    block.inverse(block(x))
    assert min(block.branch.times) >= t0
    assert max(block.branch.times) <= t1
    assert min(block.branch.times) == pytest.approx(t0, abs=1e-6)
    assert max(block.branch.times) == pytest.approx(t1, abs=1e-6)


@ALL
def test_the_steps_are_equal_to_full_precision_in_single_precision(solver):
    """A grid far from 0, of which single precision does not tell the points apart."""
    block = ODEBlock(Function(lambda t, h: -h), solver, steps=64, t0=1e4, t1=1e4 + 1 / 64)
    assert block(torch.ones(1, 1)).item() == pytest.approx(math.exp(-1 / 64), abs=64 * 6e-8)  # roundings


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@ALL
def test_every_evaluation_and_step_is_counted(solver, gradient):
    block = ODEBlock(Function(lambda t, h: torch.tanh(h)), solver, steps=9, gradient=gradient)
    out = block(state().requires_grad_())
    forward = block.stats.nfe_forward
    assert (forward, block.stats.nfe_backward) == (len(block.branch.times), 0)
    assert (block.stats.accepted, block.stats.rejected) == (9, 0)
    if solver == "explicit_adams":  # one a step, and three more in each of the two Runge–Kutta steps at the start
        assert forward == 9 + 2 * 3
    out.sum().backward()
    assert block.stats.nfe_backward == len(block.branch.times) - forward
    assert (block.stats.nfe_backward > 0) is (gradient == "adjoint")
    assert (block.stats.accepted, block.stats.nfe_forward) == (9, forward)


@ALL
def test_gradients_are_those_of_the_flow_in_both_modes(solver):
    """On a fine grid; they differ by the error of the grid."""
    x = state().requires_grad_()
    field = Linear()
    expected = torch.autograd.grad(field.flow(x).square().sum(), (x, field.A))
    for gradient in ("backprop", "adjoint"):
        block = ODEBlock(field, solver, steps=64, gradient=gradient)
        found = torch.autograd.grad(block(x).square().sum(), (x, field.A))
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()


@ALL
def test_backprop_is_the_exact_gradient_of_the_discrete_solve(solver):
    block, x = ODEBlock(Linear(), solver, steps=16), state().requires_grad_()
    assert torch.autograd.gradcheck(block, (x[:1],))
    # and of the adjoint's own solve it is not
    adjoint = ODEBlock(block.branch, solver, steps=16, gradient="adjoint")
    (exact,) = torch.autograd.grad(block(x).sum(), x)
    (near,) = torch.autograd.grad(adjoint(x).sum(), x)
    assert 1e-12 < (near - exact).norm() / exact.norm() < 1e-2


@ALL
def test_the_inverse_undoes_the_flow_to_the_order(solver):
    counts, errors, x = (32, 64, 128), [], state()
    for steps in counts:
        block = ODEBlock(Linear(), solver, steps)
        errors.append((block.inverse(block(x)) - x).norm().item())
    assert errors[-1] < 1e-4
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 3.5


@ALL
def test_a_trajectory_is_near_the_flow_at_every_time(solver):
    """The solve begins anew at each of the times; between two points of the grid by one step."""
    block, x = ODEBlock(Linear(), solver, steps=64), state()
    times = [0.0, 0.25, 0.333, 0.5, 1.0]
    exact = torch.stack([block.branch.flow(x, t) for t in times])
    torch.testing.assert_close(block.trajectory(x, times), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(block.trajectory(x, [1.0])[0], block(x))


@ALL
def test_statistics_are_updated_once_a_solve_and_by_no_inverse(solver):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(4).double()

        def forward(self, t, h):
            return 0.3 * self.norm(h) - h

    block, x = ODEBlock(Normed(), solver, steps=16, gradient="adjoint"), state()
    block(x.requires_grad_()).sum().backward()
    norm = block.branch.norm
    assert (norm.num_batches_tracked == 1).all()
    held = norm.running_mean.clone()
    block.inverse(x)
    assert torch.equal(norm.running_mean, held)


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
@ALL
def test_modes_that_need_one_step_at_a_time_are_refused(solver, gradient):
    with pytest.raises(InvalidInput, match=rf"gradient='{gradient}' needs a one-step solver, and {solver} is not one"):
        ODEBlock(Linear(), solver, gradient=gradient)


@ALL
def test_transforms_of_functions_are_refused(solver):
    block = ODEBlock(Linear(), solver)
    with pytest.raises(InvalidInput, match=rf"{solver} does not go with torch\.func.*rk4"):
        torch.func.grad(lambda x: block(x).sum())(state())


def test_an_iteration_that_does_not_converge_warns():
    block = ODEBlock(Function(lambda t, h: -20.0 * h), "implicit_adams", steps=8)
    with pytest.warns(UserWarning, match="did not converge"):
        block(ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ODEBlock(Function(lambda t, h: -20.0 * h), "implicit_adams", steps=512)(ONE)
