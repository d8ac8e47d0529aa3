"""Gradient modes: backpropagation is exact for the discrete solve, and what the other modes are beside it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as PAIR

from resode.blocks.branch import Branch
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.solvers import FixedGrid, RungeKutta, Solve
from resode.blocks.tableaux import TABLEAUX
from resode.blocks.transport import collect_penalties
from resode.errors import InvalidInput
from resode.layers.context import SolveContext, interval_time
from resode.stack import Dropout, Stack

OTHERS = GRADIENTS[1:]
"""The modes that differentiate a solve by a node of their own."""
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


def accepted_steps(block, x):
    """From where to where the steps went that a solve accepted."""
    steps = []
    scheme = block.scheme()
    with torch.no_grad():
        scheme.integrate(
            Solve(block.branch, SolveContext()),
            (x,),
            RungeKutta(scheme.tableau),
            lambda start, end, _: steps.append((start, end)),
        )
    return steps


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-4, 1e-7])
def test_the_gradient_of_an_adaptive_solve_is_the_exact_one_of_its_steps(rtol, gradient):
    """As of a fixed grid with torchdiffeq's coefficients; the choice of the steps is no part of it."""
    field, x = Field(), randn(3, 4)
    steps = accepted_steps(ODEBlock(field, "dopri5", rtol=rtol, atol=rtol), x)
    assert len({end - start for start, end in steps}) > 1, "not a fixed grid itself"
    h = x.clone().requires_grad_()
    out = h
    for start, end in steps:
        slopes = [field(start, out)]
        for alpha, row in zip(PAIR.alpha.tolist(), PAIR.beta, strict=True):
            stage = out + (end - start) * sum(w * k for w, k in zip(row.tolist(), slopes, strict=True))
            slopes.append(field(start + alpha * (end - start), stage))
        out = out + (end - start) * sum(w * k for w, k in zip(PAIR.c_sol.tolist(), slopes, strict=True))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(out), (h, *field.parameters()))])
    assert relative(gradients(field, "dopri5", gradient, rtol=rtol, atol=rtol), exact) < 1e-12


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


# Of the higher orders this field shows no slope before rounding does: test_product has them.
LOW = {name: tableau for name, tableau in TABLEAUX.items() if tableau.order <= 4}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tableau", LOW.values(), ids=LOW)
def test_the_adjoint_nears_the_true_gradient_and_backprop_by_the_order_of_the_solver(tableau, activation):
    field = Field(activation)
    true, counts, errors, differences = gradients(field, "dopri8", steps=64), [16, 32, 64], [], []
    for steps in counts:
        adjoint = gradients(field, tableau.name, "adjoint", steps=steps)
        errors.append(relative(adjoint, true))
        differences.append(relative(adjoint, gradients(field, tableau.name, steps=steps)))
    assert min(*errors, *differences) > 1e-12, "a slope of rounding is none"
    slope, near = (-np.polyfit(np.log2(counts), np.log2(e), 1)[0] for e in (errors, differences))
    assert slope == pytest.approx(tableau.order, abs=0.2)
    # heun's leading terms of the two agree: one order more (experiments.gradient_product says why).
    assert near == pytest.approx(tableau.order + ("heun" in tableau.name), abs=0.2)


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


@pytest.mark.parametrize("settings", [{"steps": 8}, {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}])
def test_loss_scaling_changes_nothing_with_penalties_on_the_way(settings):
    """Their cotangents are scaled along with the state's."""
    block, x = ODEBlock(Field(), gradient="adjoint", kinetic=0.3, **settings), randn(3, 4).requires_grad_()

    def scaled(factor):
        with collect_penalties() as penalties:
            loss = loss_of(block(x)) + sum(penalties)
        return torch.autograd.grad(factor * loss, (x, *block.parameters()))

    for plain, found in zip(scaled(1.0), scaled(2.0**20), strict=True):
        assert torch.equal(found, plain * 2.0**20)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_cotangent_of_zero_gives_gradients_of_zero(solver):
    assert (gradients(Field(), solver, "adjoint", loss=lambda out: 0.0 * out.sum()) == 0).all()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_cotangent_that_overflowed_gives_what_loss_scaling_looks_for(solver):
    """GradScaler skips a step whose gradients are not finite; an error would end the training."""
    found = gradients(Field(), solver, "adjoint", loss=lambda out: math.inf * out.sum())
    assert not torch.isfinite(found).any()


@pytest.mark.parametrize("gradient", OTHERS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_other_modes_refuse_to_be_differentiated_twice(solver, gradient):
    block = ODEBlock(Field(), solver, gradient=gradient)
    x = randn(2, 4).requires_grad_()
    out = block(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(InvalidInput, match="gradient='backprop'"):
        # A penalty on the gradient; with the loss beside it, silence would train without the penalty.
        (out.sum() + g.square().sum()).backward()


@pytest.mark.parametrize("gradient", OTHERS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_gradient_made_with_create_graph_is_the_gradient(solver, gradient):
    block, x = ODEBlock(Field(), solver, gradient=gradient), randn(2, 4).requires_grad_()
    wanted = (x, *block.parameters())
    plain = torch.autograd.grad(loss_of(block(x)), wanted)
    for found, expected in zip(torch.autograd.grad(loss_of(block(x)), wanted, create_graph=True), plain, strict=True):
        assert torch.equal(found, expected)


def test_backprop_of_an_adaptive_solve_takes_double_backward():
    field, x, v = Field(), randn(2, 4).requires_grad_(), randn(2, 4, seed=9)

    def curvature(**settings):
        (g,) = torch.autograd.grad(loss_of(ODEBlock(field, **settings)(x)), x, create_graph=True)
        return torch.cat([c.flatten() for c in torch.autograd.grad((g * v).sum(), (x, *field.parameters()))])

    exact = curvature(steps=64)
    assert relative(curvature(solver="dopri5", rtol=1e-9, atol=1e-9), exact) < 1e-6


FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own


@FORWARD_MODE
@pytest.mark.parametrize("settings", [{"steps": 16}, {"rtol": 1e-9, "atol": 1e-9}])
def test_a_solve_takes_forward_mode_with_backprop(settings):
    """The transform of torch.func and the dual numbers, for a direction in the state and one in the parameters."""
    field, x, v = Field(), randn(2, 4), randn(2, 4, seed=9)
    block = ODEBlock(field, "dopri5", **settings)
    _, tangent = torch.func.jvp(block, (x,), (v,))
    fine, e = ODEBlock(field, "rk4", steps=256), 1e-5
    with torch.no_grad():
        torch.testing.assert_close(tangent, (fine(x + e * v) - fine(x - e * v)) / (2 * e), rtol=1e-7, atol=1e-7)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(block(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(dual.tangent, tangent, rtol=1e-12, atol=1e-12)
    weights = {f"branch.{name}": p.detach() for name, p in field.named_parameters()}
    along = {name: randn(*p.shape, seed=4) for name, p in weights.items()}
    call = lambda weights: torch.func.functional_call(block, weights, (x,))  # noqa: E731
    _, tangent = torch.func.jvp(call, (weights,), (along,))
    ends = [call({name: p + s * e * along[name] for name, p in weights.items()}) for s in (1.0, -1.0)]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]).detach() / (2 * e), rtol=1e-6, atol=1e-6)


@FORWARD_MODE
@pytest.mark.parametrize("gradient", OTHERS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_other_modes_refuse_forward_mode(solver, gradient):
    block = ODEBlock(Field(), solver, gradient=gradient)
    x = randn(2, 4)
    with pytest.raises(InvalidInput, match="gradient='backprop'"):
        torch.func.jvp(block, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(InvalidInput, match="gradient='backprop'"):
        block(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("gradient", OTHERS)
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_is_refused_by_a_frozen_branch_and_without_gradients_too(frozen, gradient):
    """Where nothing asks for a backward pass: a tangent that is dropped there would be a derivative of 0."""
    block, x = ODEBlock(Field().requires_grad_(not frozen), gradient=gradient), randn(2, 4)
    with (
        torch.set_grad_enabled(frozen),
        forward_ad.dual_level(),
        pytest.raises(InvalidInput, match="gradient='backprop'"),
    ):
        block(forward_ad.make_dual(x, x))


@FORWARD_MODE
@pytest.mark.parametrize("gradient", OTHERS)
def test_the_other_modes_refuse_transforms_of_torch_func(gradient):
    block, x = ODEBlock(Field(), gradient=gradient), randn(2, 4)
    for transformed in (torch.func.grad(lambda x: block(x).sum()), torch.func.vmap(block), torch.func.jacrev(block)):
        with pytest.raises(InvalidInput, match="gradient='backprop'"):
            transformed(x)


def test_backprop_goes_with_grad_vmap_and_jacobians_of_torch_func():
    field, x = Field(), randn(3, 4)
    block = ODEBlock(field, "rk4", steps=3)
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(block(inputs)), inputs)
    torch.testing.assert_close(torch.func.grad(lambda x: loss_of(block(x)))(x), expected, rtol=1e-12, atol=1e-12)
    singles = torch.stack([block(one[None]) for one in x])
    torch.testing.assert_close(torch.func.vmap(block)(x[:, None]), singles, rtol=1e-12, atol=1e-12)
    # Gradients of each sample: vmap over grad over functional_call.
    weights = {f"branch.{name}": p.detach() for name, p in field.named_parameters()}

    def loss(weights, one):
        return loss_of(torch.func.functional_call(block, weights, (one[None],)))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, one in enumerate(x):
        own = torch.autograd.grad(loss_of(block(one[None])), list(field.parameters()))
        for found, g in zip(each.values(), own, strict=True):
            torch.testing.assert_close(found[i], g, rtol=1e-11, atol=1e-12)


def test_a_solve_that_chooses_its_steps_is_refused_by_vmap_and_goes_with_the_other_transforms():
    block, x = ODEBlock(Field(), "dopri5"), randn(3, 4)
    with pytest.raises(InvalidInput, match=r"dopri5 chooses its steps .*torch\.func\.vmap.*steps=8"):
        torch.func.vmap(block)(x[:, None])
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(block(inputs)), inputs)
    torch.testing.assert_close(torch.func.grad(lambda x: loss_of(block(x)))(x), expected, rtol=1e-12, atol=1e-12)


# --- what a graph keeps, and where it is used again ------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_two_forwards_then_both_backwards_give_the_gradients_of_each(solver, gradient):
    """With dropout, standardized weights, a time channel, batch norm: all that the other solve could leave behind."""
    torch.manual_seed(0)
    stack = Stack(dropout=Dropout("unit", 0.3), conv="weight-standardized", activation="tanh")
    block = ODEBlock(Branch(4, stack, time="concat").double(), solver, gradient=gradient)
    xs = [randn(3, 4, 5, 5, seed=seed).requires_grad_() for seed in (1, 2)]

    def losses():
        torch.manual_seed(3)
        return [block(x).square().sum() for x in xs]

    def grads(loss, x):
        return torch.autograd.grad(loss, (x, *block.parameters()))

    alone = [grads(losses()[i], xs[i]) for i in (0, 1)]
    together = losses()
    for i in (1, 0):  # in the other order than the forwards
        assert all(torch.equal(a, b) for a, b in zip(grads(together[i], xs[i]), alone[i], strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_block_used_twice_in_a_net_is_two_solves(gradient):
    torch.manual_seed(0)
    stack = Stack(norm="group", activation="tanh", conv="weight-standardized")
    block = ODEBlock(Branch(4, stack, time="concat").double(), steps=3, gradient=gradient)
    other, x = copy.deepcopy(block), randn(3, 4, 5, 5)
    shared = torch.autograd.grad(block(block(x)).square().sum(), tuple(block.parameters()))
    pair = (*block.parameters(), *other.parameters())
    apart = torch.autograd.grad(other(block(x)).square().sum(), pair)
    for total, first, second in zip(shared, apart[: len(shared)], apart[len(shared) :], strict=True):
        assert relative(first + second, total) < 1e-12


def kept(gradient, steps, **settings):
    """How many tensors of at least the state's size the graph of a solve keeps."""
    x, count = randn(2, 4), 0

    def pack(tensor):
        nonlocal count
        count += tensor.numel() >= x.numel() and not isinstance(tensor, nn.Parameter)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ODEBlock(Field(), "rk4", steps=steps, gradient=gradient, **settings)(x.requires_grad_())
    return count


def test_what_a_solve_keeps_for_its_backward_pass():
    """The end alone (both halves of a reversible one), one state a step, or all stages."""
    assert [kept("adjoint", steps) for steps in (2, 32)] == [1, 1]
    assert [kept("reversible", steps) for steps in (2, 32)] == [2, 2]
    assert [kept("checkpoint", steps) for steps in (2, 32)] == [2, 32]
    assert kept("backprop", 32) == 16 * kept("backprop", 2) >= 32 * 4, "each of the four stages of each step, at least"


def test_a_graph_kept_can_be_differentiated_again():
    for gradient in GRADIENTS:
        field, x = Branch(4, Stack(norm="group", conv="weight-standardized"), time="concat").double(), randn(2, 4, 5, 5)
        out = ODEBlock(field, steps=2, gradient=gradient)(x.requires_grad_()).sum()
        first = torch.autograd.grad(out, (x, *field.parameters()), retain_graph=True)
        second = torch.autograd.grad(out, (x, *field.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weights_changed_between_forward_and_backward_are_an_error(gradient):
    """As torch says of any tensor that backward needs: not a gradient of another field."""
    field = Field()
    out = ODEBlock(field, gradient=gradient)(randn(2, 4)).sum()
    with torch.no_grad():
        field.W.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_parameters_put_in_for_one_call_are_an_error_not_a_zero():
    field = Field()
    others = {f"branch.{name}": (2 * p.detach()).requires_grad_() for name, p in field.named_parameters()}
    for gradient in GRADIENTS:
        out = torch.func.functional_call(ODEBlock(field, gradient=gradient), others, (randn(2, 4),)).sum()
        if gradient == "backprop":
            out.backward()
            assert all(p.grad.norm() > 0 for p in others.values())
        else:
            with pytest.raises(InvalidInput, match="functional_call"):
                out.backward()


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_from_outside_gets_its_gradient_or_an_error(solver, leaf):
    """A condition hung on the branch is no parameter of it: a mode that does not know it must say so."""

    class Conditioned(Field):
        def forward(self, t, h):
            return super().forward(t, h) + self.condition

    for gradient in GRADIENTS:
        field, source = Conditioned(), randn(4).requires_grad_()
        field.condition = source if leaf else 2.0 * source
        out = ODEBlock(field, solver, gradient=gradient)(randn(3, 4)).sum()
        if gradient == "backprop":
            out.backward()
            assert source.grad.norm() > 0
        else:
            with pytest.raises(InvalidInput, match=r"shape \(4,\).*none of its parameters"):
                out.backward()
        field = Conditioned()
        field.condition = randn(4)
        ODEBlock(field, solver, gradient=gradient)(randn(3, 4)).sum().backward()


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
@pytest.mark.parametrize(
    "settings", [{"solver": "rk4"}, {"solver": "dopri5"}, {"solver": "dopri5", "error_norm": "sample"}]
)
def test_an_empty_batch_has_an_empty_result_and_gradients_of_zero(settings, gradient):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(randn(4, 4))

        def forward(self, t, h):
            return torch.tanh(h @ self.W)

    block, x = ODEBlock(Field(), gradient=gradient, **settings), randn(0, 4).requires_grad_()
    out = block(x)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 4)
    assert torch.equal(block.branch.W.grad, torch.zeros_like(block.branch.W))


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


@pytest.mark.parametrize("gradient", OTHERS)
def test_autocast_off_inside_forward_stays_off_in_backward_under_autocast(gradient):
    """backward() called inside an autocast region must not recompute a float32 field in bfloat16."""
    field = Field().float()
    x = randn(3, 4, dtype=torch.float32).requires_grad_()
    block = ODEBlock(field, gradient=gradient)
    expected = torch.autograd.grad(loss_of(block(x)), (x, *field.parameters()))
    out = loss_of(block(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, (x, *field.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fixed_grids_by_hand_agree_with_the_block():
    field, x = Field(), randn(3, 4)
    grid = tuple(np.linspace(0.0, 1.0, 6))
    with torch.no_grad():
        scheme = FixedGrid(TABLEAUX["rk4"], grid)
        (by_hand,) = scheme.integrate(Solve(field, SolveContext()), (x,), RungeKutta(scheme.tableau))
        torch.testing.assert_close(by_hand, ODEBlock(field, "rk4", steps=5)(x))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_graph_keeps_may_be_moved_away_or_made_again_by_torchs_own_means(gradient):
    """Hooks that pack tensors (as to offload them), and torch.utils.checkpoint around the block (made anew)."""
    torch.manual_seed(0)
    stack = Stack(activation="tanh", norm="group", conv="weight-standardized", dropout=Dropout("unit", 0.3))
    block = ODEBlock(Branch(4, stack, time="concat").double(), "dopri5", gradient=gradient)
    x = randn(3, 4, 5, 5).requires_grad_()

    def grads(solve):
        torch.manual_seed(3)
        return torch.autograd.grad(solve(x).square().sum(), (x, *block.parameters()))

    def packed(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.detach().clone(), lambda kept: kept):
            return block(x)

    expected = grads(block)
    for solve in (packed, lambda x: checkpoint(block, x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(grads(solve), expected, strict=True))
