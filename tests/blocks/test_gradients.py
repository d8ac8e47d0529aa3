"""Gradient modes: backpropagation is exact for the discrete solve; the adjoint is near it by the solver's order."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torchdiffeq import odeint
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as PAIR

from resode.blocks.branch import Branch
from resode.blocks.gradients import GRADIENTS
from resode.blocks.ode import ODEBlock
from resode.blocks.solvers import TABLEAUX, FixedGrid, Solve
from resode.errors import InvalidInput
from resode.layers.context import SolveContext, interval_time
from resode.stack import Dropout, Stack

ACTIVATIONS = {"tanh": torch.tanh, "softplus": torch.nn.functional.softplus}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Field(nn.Module):
    """f(t, h) = 0.3·act(h W + b)·V·(1 + t²)"""

    def __init__(self, activation="tanh", c=4):
        super().__init__()
        self.W, self.V = nn.Parameter(randn(c, c, seed=1)), nn.Parameter(randn(c, c, seed=2))
        self.b = nn.Parameter(randn(c, seed=3))
        self.act = ACTIVATIONS[activation]

    def forward(self, t, h):
        return 0.3 * self.act(h @ self.W + self.b) @ self.V * (1.0 + t**2)


def loss_of(out):
    return (torch.sin(out) * torch.linspace(0.5, 2.0, out.shape[-1], dtype=out.dtype)).sum()


def gradients(field, solver="rk4", gradient="backprop", loss=loss_of, x=None, **settings):
    """∂loss/∂(x, parameters), flat and in one."""
    x = (randn(3, 4) if x is None else x).clone().requires_grad_()
    block = ODEBlock(field, solver, gradient=gradient, **settings)
    wanted = (x, *(p for p in field.parameters() if p.requires_grad))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(block(x)), wanted)])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- backprop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", TABLEAUX)
def test_backprop_is_the_derivative_of_the_discrete_solve(solver):
    field = Field()
    block = ODEBlock(field, solver, steps=3)
    torch.autograd.gradcheck(lambda x, *_: block(x), (randn(2, 4).requires_grad_(), *field.parameters()))


class Watched(Field):
    """torchdiffeq's account of the steps it accepted."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def forward(self, t, h):
        return super().forward(float(t), h)

    def callback_accept_step(self, t0, y0, dt):
        self.steps.append(float(t0))


@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-4])
def test_backprop_of_an_adaptive_solve_is_the_exact_gradient_of_its_steps(rtol):
    """The same steps as a fixed grid of the same tableau, differentiated; the choice of the steps is no part of it."""
    field, x = Watched(), randn(3, 4)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        odeint(field, x, times, rtol=rtol, atol=rtol, method="dopri5", options={"step_t": times[1:]})
    h = x.clone().requires_grad_()
    out = h
    for start, end in pairwise([*field.steps, 1.0]):
        slopes = [Field.forward(field, start, out)]
        for alpha, row in zip(PAIR.alpha.tolist(), PAIR.beta, strict=True):
            stage = out + (end - start) * sum(w * k for w, k in zip(row.tolist(), slopes, strict=True))
            slopes.append(Field.forward(field, start + alpha * (end - start), stage))
        out = out + (end - start) * sum(w * k for w, k in zip(PAIR.c_sol.tolist(), slopes, strict=True))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(out), (h, *field.parameters()))])
    assert relative(gradients(field, "dopri5", rtol=rtol, atol=rtol), exact) < 1e-11


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_backprop_takes_double_backward_and_forward_mode():
    field = Field()
    block = ODEBlock(field, "rk4", steps=3)
    x = randn(2, 4).requires_grad_()
    torch.autograd.gradgradcheck(lambda x: block(x), (x,))
    v = randn(2, 4, seed=9)
    _, tangent = torch.func.jvp(block, (x.detach(),), (v,))
    e = 1e-5
    with torch.no_grad():
        torch.testing.assert_close(tangent, (block(x + e * v) - block(x - e * v)) / (2 * e), rtol=1e-7, atol=1e-7)


# --- the adjoint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_the_adjoint_nears_the_true_gradient_and_backprop_by_the_order_of_the_solver(tableau, activation):
    field = Field(activation)
    counts = [16, 32, 64]
    true, errors, differences = gradients(field, steps=400), [], []
    for steps in counts:
        adjoint = gradients(field, tableau.name, "adjoint", steps=steps)
        errors.append(relative(adjoint, true))
        differences.append(relative(adjoint, gradients(field, tableau.name, steps=steps)))
    slope, near = (-np.polyfit(np.log2(counts), np.log2(e), 1)[0] for e in (errors, differences))
    assert slope == pytest.approx(tableau.order, abs=0.2)
    # heun's leading terms of the two agree: one order more.
    assert near == pytest.approx(tableau.order + (tableau.name == "heun"), abs=0.2)


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8"])
def test_the_adjoint_nears_the_true_gradient_with_the_tolerance(solver):
    field = Field()
    exact = gradients(field, "rk4", steps=512)
    errors = []
    for tol in (1e-3, 1e-5, 1e-7):
        errors.append(relative(gradients(field, solver, "adjoint", rtol=tol, atol=tol), exact))
        assert errors[-1] < 100 * tol
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("settings", [{"steps": 8}, {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}])
def test_loss_scaling_changes_nothing(settings):
    """The cotangent is normalized: neither the steps of an adaptive adjoint nor its result know the scale."""
    field = Field()
    plain = gradients(field, gradient="adjoint", **settings)
    for power in (27, -27, 90):
        scaled = gradients(field, gradient="adjoint", loss=lambda out: loss_of(out) * 2.0**power, **settings)  # noqa: B023
        assert torch.equal(scaled, plain * 2.0**power)
    scaled = gradients(field, gradient="adjoint", loss=lambda out: loss_of(out) * 1e8, **settings)
    assert relative(scaled, plain * 1e8) < 1e-9


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_cotangent_of_zero_gives_gradients_of_zero(solver):
    assert (gradients(Field(), solver, "adjoint", loss=lambda out: 0.0 * out.sum()) == 0).all()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_cotangent_that_overflowed_gives_what_loss_scaling_looks_for(solver):
    """GradScaler skips a step whose gradients are not finite; an error would end the training."""
    found = gradients(Field(), solver, "adjoint", loss=lambda out: math.inf * out.sum())
    assert not torch.isfinite(found).any()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_adjoint_refuses_to_be_differentiated_twice(solver):
    block = ODEBlock(Field(), solver, gradient="adjoint")
    x = randn(2, 4).requires_grad_()
    out = block(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(InvalidInput, match="gradient='backprop'"):
        # A penalty on the gradient; with the loss beside it, silence would train without the penalty.
        (out.sum() + g.square().sum()).backward()


def test_backprop_of_an_adaptive_solve_takes_double_backward():
    field, x, v = Field(), randn(2, 4).requires_grad_(), randn(2, 4, seed=9)

    def curvature(**settings):
        (g,) = torch.autograd.grad(loss_of(ODEBlock(field, **settings)(x)), x, create_graph=True)
        return torch.cat([c.flatten() for c in torch.autograd.grad((g * v).sum(), (x, *field.parameters()))])

    exact = curvature(steps=64)
    assert relative(curvature(solver="dopri5", rtol=1e-9, atol=1e-9), exact) < 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_an_adaptive_solve_refuses_forward_mode():
    block, x = ODEBlock(Field(), "dopri5"), randn(2, 4)
    with pytest.raises(InvalidInput, match="fixed grid"):
        torch.func.jvp(block, (x,), (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_the_adjoint_refuses_forward_mode():
    block = ODEBlock(Field(), gradient="adjoint")
    x = randn(2, 4)
    with pytest.raises(InvalidInput, match="gradient='backprop'"):
        torch.func.jvp(block, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(InvalidInput, match="gradient='backprop'"):
        block(forward_ad.make_dual(x, x))


def test_the_adjoint_keeps_nothing_for_its_steps():
    def kept(steps, gradient):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ODEBlock(Field(), "rk4", steps=steps, gradient=gradient)(randn(2, 4).requires_grad_())
        return count

    assert kept(2, "adjoint") == kept(32, "adjoint")
    assert kept(32, "backprop") > 10 * kept(2, "backprop")


def test_a_graph_kept_can_be_differentiated_again():
    for gradient in GRADIENTS:
        field, x = Branch(4, Stack(norm="group", conv="weight-standardized"), time="concat").double(), randn(2, 4, 5, 5)
        out = ODEBlock(field, steps=2, gradient=gradient)(x.requires_grad_()).sum()
        first = torch.autograd.grad(out, (x, *field.parameters()), retain_graph=True)
        second = torch.autograd.grad(out, (x, *field.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_changed_between_forward_and_backward_are_an_error():
    """As torch says of any tensor that backward needs: not a gradient of another field."""
    field = Field()
    out = ODEBlock(field, gradient="adjoint")(randn(2, 4)).sum()
    with torch.no_grad():
        field.W.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_parameters_put_in_for_one_call_are_an_error_not_a_zero():
    field = Field()
    others = {f"branch.{name}": (2 * p.detach()).requires_grad_() for name, p in field.named_parameters()}
    for gradient in GRADIENTS:
        out = torch.func.functional_call(ODEBlock(field, gradient=gradient), others, (randn(2, 4),)).sum()
        if gradient == "adjoint":
            with pytest.raises(InvalidInput, match="functional_call"):
                out.backward()
        else:
            out.backward()
            assert all(p.grad.norm() > 0 for p in others.values())


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_from_outside_gets_its_gradient_or_an_error(solver, leaf):
    """A condition hung on the branch is no parameter of it: the adjoint does not know it, and must say so."""

    class Conditioned(Field):
        def forward(self, t, h):
            return super().forward(t, h) + self.condition

    for gradient in GRADIENTS:
        field, source = Conditioned(), randn(4).requires_grad_()
        field.condition = source if leaf else 2.0 * source
        out = ODEBlock(field, solver, gradient=gradient)(randn(3, 4)).sum()
        if gradient == "adjoint":
            with pytest.raises(InvalidInput, match=r"shape \(4,\).*none of its parameters"):
                out.backward()
        else:
            out.backward()
            assert source.grad.norm() > 0
    field = Conditioned()
    field.condition = randn(4)
    ODEBlock(field, solver, gradient="adjoint")(randn(3, 4)).sum().backward()


# --- what needs a gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_state_alone(solver, gradient):
    field = Field().requires_grad_(False)
    tolerances = {"rtol": 1e-8, "atol": 1e-8} if solver == "dopri5" else {}
    both = gradients(Field(), solver, gradient, **tolerances)
    alone = gradients(field, solver, gradient, **tolerances)
    assert alone.numel() == 12
    assert relative(alone, both[:12]) < 1e-6
    assert all(p.grad is None for p in field.parameters())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_parameters_alone(solver, gradient):
    field, twin, x = Field(), Field(), randn(3, 4)
    loss_of(ODEBlock(field, solver, gradient=gradient)(x)).backward()
    loss_of(ODEBlock(twin, solver, gradient=gradient)(x.clone().requires_grad_())).backward()
    assert x.grad is None
    for p, q in zip(field.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_frozen_parameters_get_nothing_and_change_nothing_for_the_others(gradient):
    field, x = Field(), randn(3, 4).requires_grad_()
    loss = loss_of(ODEBlock(field, gradient=gradient)(x))
    full = dict(zip("xWVb", torch.autograd.grad(loss, (x, *field.parameters())), strict=True))
    field.V.requires_grad_(False)
    loss_of(ODEBlock(field, gradient=gradient)(x)).backward()
    assert field.V.grad is None
    for name, found in (("x", x.grad), ("W", field.W.grad), ("b", field.b.grad)):
        torch.testing.assert_close(found, full[name])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_without_grad_there_is_no_graph(solver, gradient):
    stack = Stack(norm="group", conv="weight-standardized", dropout=Dropout("dropconnect", 0.3))
    block = ODEBlock(Branch(4, stack, time="concat").double(), solver, steps=2, gradient=gradient)
    x = randn(2, 4, 5, 5)
    with torch.no_grad():
        out = block(x.requires_grad_())
    assert not out.requires_grad
    with torch.inference_mode():
        assert block.eval()(x).is_inference()
    block.train().requires_grad_(False)
    assert not block(x.detach()).requires_grad
    assert block(x).requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_parameter_that_f_does_not_use_and_a_field_of_time_alone(solver, gradient):
    class OfTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Parameter(randn(4)), nn.Parameter(randn(4))

        def forward(self, t, h):
            return (t * self.used).expand_as(h)

    field, x = OfTime(), randn(3, 4).requires_grad_()
    ODEBlock(field, solver, gradient=gradient)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(field.used.grad, torch.full_like(field.used, 1.5))
    assert field.unused.grad is None or (field.unused.grad == 0).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_field_without_any_derivative(solver, gradient):
    class Constant(nn.Module):
        def forward(self, t, h):
            return torch.full_like(h, 2.0)

    x = randn(3, 4).requires_grad_()
    out = ODEBlock(Constant(), solver, gradient=gradient)(x)
    torch.testing.assert_close(out, x + 2.0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


# --- breakpoints, derived tensors, autocast --------------------------------------------------------------------------


class Pieces(nn.Module):
    """dh/dt = tanh(h W_i), with W_1 before t = ½ and W_2 after."""

    breakpoints = (0.5,)

    def __init__(self):
        super().__init__()
        self.W = nn.ParameterList([randn(4, 4, seed=1), randn(4, 4, seed=2)])

    def forward(self, t, h):
        return torch.tanh(h @ self.W[interval_time(t) > 0.5])


@pytest.mark.parametrize("settings", [{"steps": 64}, {"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}])
def test_the_adjoint_uses_each_pieces_own_weights(settings):
    field = Pieces()
    exact = gradients(field, steps=64)
    assert relative(gradients(field, gradient="adjoint", **settings), exact) < 1e-6


STACKS = {
    "standardized": Stack(norm="group", activation="tanh", conv="weight-standardized"),
    "dropconnect": Stack(norm="group", activation="tanh", dropout=Dropout("dropconnect", 0.3)),
    "unit dropout": Stack(norm="group", activation="tanh", dropout=Dropout("unit", 0.3)),
    "batch norm": Stack(activation="tanh"),
}


@pytest.mark.parametrize("time", ["none", "concat", "film"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_adjoint_of_our_branches(stack, time):
    torch.manual_seed(0)
    field = Branch(4, stack, time=time, expansion=2).double()

    def found(gradient):
        torch.manual_seed(1)
        return gradients(field, "rk4", gradient, steps=16, x=randn(4, 4, 5, 5), mask_intervals=2)

    assert relative(found("adjoint"), found("backprop")) < 1e-3


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_under_autocast_backward_integrates_the_field_of_forward(solver, gradient, inside):
    """Wherever backward is called: autocast keeps cast weights, and one cast without a graph must not be met again."""
    kinds = set()

    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, t, h):
            out = torch.tanh(self.conv(h))
            kinds.add(out.dtype)
            return out

    torch.manual_seed(0)
    field, x = Notes(), randn(2, 4, 5, 5, dtype=torch.float32).requires_grad_()
    wanted = (x, *field.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = ODEBlock(field, solver, steps=8, gradient=gradient)(x)
        found = torch.autograd.grad(out.square().sum(), wanted) if inside else None
    assert out.dtype == torch.float32, "the state keeps its type"
    found = found or torch.autograd.grad(out.square().sum(), wanted)
    assert kinds == {torch.bfloat16}
    exact = torch.autograd.grad(ODEBlock(field, "rk4", steps=8)(x).square().sum(), wanted)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 0.02


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_autocast_after_a_stem_of_half_precision(solver, gradient):
    """The usual place of a block: its input comes out of a convolution in bfloat16."""
    torch.manual_seed(0)
    stem, field = nn.Conv2d(3, 4, 3), Branch(4, Stack(norm="group", activation="tanh"), time="concat")
    block = ODEBlock(field, solver, steps=8, gradient=gradient)
    x = randn(2, 3, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(stem(x))
    out.float().square().sum().backward()
    got = {name: p.grad for name, p in [*stem.named_parameters(), *field.named_parameters()]}
    for p in (*stem.parameters(), *field.parameters()):
        p.grad = None
    ODEBlock(field, "rk4", steps=8)(stem(x)).square().sum().backward()
    for name, p in [*stem.named_parameters(), *field.named_parameters()]:
        assert got[name].dtype == torch.float32
        assert relative(got[name], p.grad) < 0.06, name


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_net_of_half_precision(solver, gradient):
    exact = gradients(Field(), steps=8)
    found = gradients(Field().bfloat16(), solver, gradient, steps=8, x=randn(3, 4).bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative(found.double(), exact) < 0.05


def test_the_adjoint_of_a_net_of_half_precision_sums_in_single():
    """512 parts of 1/512 each: in bfloat16 the sum would stop growing at a half."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))

        def forward(self, t, h):
            return self.w.expand_as(h)

    block = ODEBlock(Constant(), "euler", steps=512, gradient="adjoint")
    block(torch.zeros(1, 4, dtype=torch.bfloat16)).sum().backward()
    torch.testing.assert_close(block.branch.w.grad, torch.ones(4, dtype=torch.bfloat16))


def test_autocast_off_inside_forward_stays_off_in_backward_under_autocast():
    """backward() called inside an autocast region must not recompute a float32 field in bfloat16."""
    field = Field().float()
    x = randn(3, 4, dtype=torch.float32).requires_grad_()
    block = ODEBlock(field, gradient="adjoint")
    expected = torch.autograd.grad(loss_of(block(x)), (x, *field.parameters()))
    out = loss_of(block(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, (x, *field.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fixed_grids_by_hand_agree_with_the_block():
    field, x = Field(), randn(3, 4)
    grid = tuple(np.linspace(0.0, 1.0, 6))
    with torch.no_grad():
        by_hand = FixedGrid(TABLEAUX["rk4"], grid).integrate(Solve(field, SolveContext()), x)
        torch.testing.assert_close(by_hand, ODEBlock(field, "rk4", steps=5)(x))
