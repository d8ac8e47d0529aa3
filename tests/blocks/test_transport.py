"""Penalties along a solve: their values on a linear field, their gradients in each mode, where they are collected."""

import copy
import math

import pytest
import torch
from operations import Operations
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS, SOLVERS
from resode.blocks.transport import collect_penalties
from resode.errors import InvalidInput
from resode.stack import Stack


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """dh/dt = A h."""

    def __init__(self, c=3):
        super().__init__()
        self.A = nn.Parameter(0.6 * randn(c, c, seed=2))
        self.calls = 0

    def forward(self, t, h):
        self.calls += 1
        return h @ self.A.T


class Nonlinear(Linear):
    def forward(self, t, h):
        return torch.tanh(super().forward(t, h)) * (1.0 + t)


def penalty(block, x):
    """The result and the one penalty of a solve."""
    with collect_penalties() as found:
        out = block(x)
    (value,) = found
    return out, value


def kinetic_energy(A, x, points=2001):
    """1/(B d) ∫ ‖A h‖² dt with h = exp(A t) x, by Simpson's rule."""
    times = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    paths = torch.stack([x @ torch.linalg.matrix_exp(t * A).T @ A.T for t in times])
    values = paths.square().mean((1, 2))
    weights = torch.ones(points, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return (weights @ values / (3.0 * (points - 1))).detach()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("settings", [{"solver": "rk4", "steps": 64}, {"solver": "dopri5", "rtol": 1e-9, "atol": 1e-9}])
def test_the_kinetic_energy_of_a_linear_flow_is_exact(settings, gradient):
    block, x = ODEBlock(Linear(), kinetic=0.5, gradient=gradient, **settings), randn(4, 3)
    _, found = penalty(block, x)
    torch.testing.assert_close(found, 0.5 * kinetic_energy(block.branch.A, x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_field_of_the_time_alone_has_no_jacobian(grad):
    class OfTime(nn.Module):
        def __init__(self, learned):
            super().__init__()
            self.speed = nn.Parameter(torch.tensor(2.0), requires_grad=learned)

        def forward(self, t, h):
            return (t * self.speed).expand_as(h)

    with torch.set_grad_enabled(grad):
        for learned in (True, False):
            _, found = penalty(ODEBlock(OfTime(learned), kinetic=1.0, jacobian=1.0), randn(4, 3))
            assert found.item() == pytest.approx(4.0 / 3.0)


def test_a_jacobian_in_inference_mode_is_refused():
    block = ODEBlock(Linear(), jacobian=1.0)
    with torch.inference_mode(), pytest.raises(InvalidInput, match=r"jacobian .*inference_mode.*torch\.no_grad"):
        penalty(block, randn(4, 3))
    with torch.inference_mode():
        block(randn(4, 3))
        penalty(ODEBlock(Linear(), kinetic=1.0), randn(4, 3))


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_kinetic_energy_by_a_multistep_method(solver):
    block, x = ODEBlock(Linear(), solver, steps=64, kinetic=0.5), randn(4, 3)
    _, found = penalty(block, x)
    torch.testing.assert_close(found, 0.5 * kinetic_energy(block.branch.A, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_jacobian_penalty_of_a_linear_field_is_exact_for_the_noise_of_its_solve(gradient):
    """εᵀA is constant: its mean square is the integral, whatever the solver."""
    block, x = ODEBlock(Linear(), "heun", steps=3, t1=1.5, jacobian=0.2, gradient=gradient), randn(4, 3)
    torch.manual_seed(5)
    _, found = penalty(block, x)
    torch.manual_seed(5)
    noise = torch.randn_like(x)
    torch.testing.assert_close(found, 0.2 * 1.5 * (noise @ block.branch.A).square().mean(), rtol=1e-12, atol=0)


def test_the_jacobian_penalty_is_the_frobenius_norm_on_the_average():
    """Over n samples: E‖εᵀA‖² = ‖A‖²_F, with the variance 2‖AAᵀ‖²_F of a quadratic form of Gaussians."""
    torch.manual_seed(0)
    block, n = ODEBlock(Linear(), "euler", steps=1, jacobian=1.0), 20_000
    A = block.branch.A.detach()
    _, found = penalty(block, randn(n, 3))
    deviation = (2.0 * (A @ A.T).square().sum() / n).sqrt() / 3.0
    assert abs(found - A.square().sum() / 3.0) < 4.0 * deviation
    assert deviation < 0.02 * found


def test_both_penalties_are_added_with_their_weights():
    x = randn(4, 3)
    values = []
    for kinetic, jacobian in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)):
        torch.manual_seed(1)
        values.append(penalty(ODEBlock(Nonlinear(), kinetic=kinetic, jacobian=jacobian), x)[1])
    torch.testing.assert_close(values[2], 0.3 * values[0] + 0.7 * values[1], rtol=1e-12, atol=0)


def test_the_noise_is_drawn_anew_for_each_solve():
    block, x = ODEBlock(Linear(), "euler", steps=1, jacobian=1.0), randn(4, 3)
    assert penalty(block, x)[1] != penalty(block, x)[1]


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_penalties_are_those_of_the_whole_state_with_its_extra_channels(solver):
    class Constant(nn.Module):
        """f = 1 on three channels."""

        def forward(self, t, h):
            return torch.ones_like(h)

    _, found = penalty(ODEBlock(Constant(), solver, t1=2.0, kinetic=1.0, extra_channels=1), randn(4, 2))
    assert found.item() == pytest.approx(2.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [{"kinetic": 0.1}, {"jacobian": 0.1}])
def test_collecting_changes_no_result(solver, weights):
    """The integrals are left out of the error control: the steps are the same."""
    settings = {"steps": 16} if solver in MULTISTEP else {}
    block, x = ODEBlock(Nonlinear(), solver, **settings, **weights), 0.3 * randn(4, 3)
    plain = block(x)
    nfe = block.stats.nfe_forward
    out, _ = penalty(block, x)
    assert block.stats.nfe_forward == nfe
    torch.testing.assert_close(out, plain, rtol=1e-14, atol=1e-14)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(block, x, seed=3):
    """Of a loss with a penalty, for x and the parameters."""
    torch.manual_seed(seed)
    out, value = penalty(block, x)
    return torch.autograd.grad(out.square().sum() + 5.0 * value, (x, *block.parameters()))


SETTINGS = [
    {"solver": "rk4", "steps": 5},
    {"solver": "dopri5", "steps": 4},
    {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4},
    {"solver": "dopri8", "rtol": 1e-4, "atol": 1e-4},
]
WEIGHTS = [{"kinetic": 0.3}, {"jacobian": 0.3}, {"kinetic": 0.2, "jacobian": 0.4}]


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_backprop_and_checkpoint_agree_to_rounding(settings, weights):
    x, field = randn(4, 3).requires_grad_(), Nonlinear()
    expected = gradients(ODEBlock(field, **settings, **weights), x)
    found = gradients(ODEBlock(field, gradient="checkpoint", **settings, **weights), x)
    close(found, expected, 1e-10)
    without = torch.autograd.grad(ODEBlock(field, **settings)(x).square().sum(), (x, field.A))
    assert (expected[1] - without[1]).norm() > 1e-2 * without[1].norm(), "the penalty has a say"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_backprop_is_the_derivative_by_finite_differences(weights):
    block, x = ODEBlock(Nonlinear(), "rk4", steps=3, **weights), randn(2, 3)

    def value(x, A):
        torch.manual_seed(0)
        with collect_penalties() as found:
            out = torch.func.functional_call(block, {"branch.A": A}, (x,))
        return out, found[0]

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), block.branch.A))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_the_other_modes_converge_to_the_gradient_by_the_order_of_the_solver(gradient, weights):
    x, field = randn(4, 3).requires_grad_(), Nonlinear()
    exact = gradients(ODEBlock(field, "rk4", steps=200, **weights), x)
    errors = []
    for steps in (10, 40):
        found = gradients(ODEBlock(field, "rk4", steps=steps, gradient=gradient, **weights), x)
        errors.append(max((a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)).item())
    assert math.log(errors[0] / errors[1], 4.0) == pytest.approx(4.0, abs=0.2)


def test_the_adjoint_of_an_adaptive_solve_converges_with_the_tolerance():
    x, field = randn(4, 3).requires_grad_(), Nonlinear()
    exact = gradients(ODEBlock(field, "rk4", steps=200, kinetic=0.2, jacobian=0.4), x)
    adjoint = ODEBlock(field, "dopri5", rtol=1e-9, atol=1e-9, gradient="adjoint", kinetic=0.2, jacobian=0.4)
    close(gradients(adjoint, x), exact, 1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_penalty_alone_has_a_gradient(gradient):
    block, x = ODEBlock(Nonlinear(), "rk4", steps=20, gradient=gradient, kinetic=1.0), randn(4, 3)
    _, value = penalty(block, x)
    value.backward()
    plain = ODEBlock(copy.deepcopy(block.branch), "rk4", steps=20, kinetic=1.0)
    plain.zero_grad()
    penalty(plain, x)[1].backward()
    close([block.branch.A.grad], [plain.branch.A.grad], 1e-3)


# --- where they are collected ----------------------------------------------------------------------------------------


def test_nothing_is_computed_outside_of_a_collection():
    block, plain = ODEBlock(Linear(), kinetic=1.0, jacobian=1.0), ODEBlock(Linear())
    x = randn(4, 3)
    with Operations() as with_weights:
        block(x)
    with Operations() as without:
        plain(x)
    assert with_weights.names == without.names
    with Operations() as collecting, collect_penalties():
        block(x)
    assert len(collecting.names) > len(without.names)


def test_a_block_without_weights_has_no_penalty():
    with collect_penalties() as found:
        ODEBlock(Linear())(randn(4, 3))
    assert found == []


def test_each_solve_gives_an_entry():
    net = nn.Sequential(ODEBlock(Linear(), kinetic=1.0), ODEBlock(Linear()), ODEBlock(Linear(), jacobian=1.0))
    x = randn(4, 3)
    with collect_penalties() as found:
        net(x)
        net[0](x)
    assert len(found) == 3
    assert all(value.shape == () and value > 0 for value in found)


def test_collections_nest_and_end():
    block, x = ODEBlock(Linear(), kinetic=1.0), randn(4, 3)
    with collect_penalties() as outer:
        block(x)
        with collect_penalties() as inner:
            block(x)
            block(x)
        with pytest.raises(ZeroDivisionError), collect_penalties():
            raise ZeroDivisionError
        block(x)
    block(x)
    assert (len(outer), len(inner)) == (2, 2)


def test_trajectories_and_inverses_have_no_penalty():
    block, x = ODEBlock(Linear(), kinetic=1.0), randn(4, 3)
    with collect_penalties() as found:
        block.trajectory(x, [0.5, 1.0])
        block.inverse(x)
    assert found == []


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_penalty_leaves_nothing_on_the_module(gradient, grad):
    block, x = ODEBlock(Linear(), kinetic=1.0, jacobian=1.0, gradient=gradient), randn(4, 3)
    held = set(vars(block)), set(vars(block.branch))
    with torch.set_grad_enabled(grad):
        _, value = penalty(block, x)
    assert value.requires_grad is grad
    assert (set(vars(block)), set(vars(block.branch))) == held
    twin = copy.deepcopy(block)
    assert torch.equal(twin.branch.A, block.branch.A)
    block.eval()(x)
    copy.deepcopy(block)


def test_a_penalty_without_gradients_has_its_value():
    """The Jacobian is itself a derivative, in a solve without gradients, too."""
    block, x = ODEBlock(Linear(), kinetic=1.0, jacobian=1.0), randn(4, 3)
    values = []
    for grad in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            values.append(penalty(block, x)[1])
    torch.testing.assert_close(values[1], values[0].detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_penalties_of_a_branch_with_convolutions_and_norms_in_training(gradient):
    torch.manual_seed(0)
    branch = Branch(4, Stack(activation="tanh", conv="weight-standardized"), time="concat").double()
    block, x = ODEBlock(branch, steps=3, gradient=gradient, kinetic=0.1, jacobian=0.1), randn(3, 4, 5, 5)
    out, value = penalty(block, x.requires_grad_())
    (out.square().mean() + value).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    if gradient == "checkpoint":
        twin = ODEBlock(copy.deepcopy(branch), steps=3, kinetic=0.1, jacobian=0.1)
        twin.zero_grad()
        torch.manual_seed(7)
        out, value = penalty(twin, x)
        (out.square().mean() + value).backward()
        block.zero_grad()
        torch.manual_seed(7)
        out, value = penalty(block, x)
        (out.square().mean() + value).backward()
        for p, q in zip(block.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_integral_of_a_state_of_half_precision_is_kept_in_single(dtype):
    class Decay(nn.Module):
        def forward(self, t, h):
            return -h

    _, value = penalty(ODEBlock(Decay(), "rk4", steps=16, kinetic=1.0), torch.ones(2, 3, dtype=dtype))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((1.0 - math.exp(-2.0)) / 2.0, rel=0.01)
