"""Parameters that vary with t: θ(t) in the place of θ, the twin of untied blocks, orders, gradients, and no traces."""

import copy
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel

from resode import InvalidInput
from resode.blocks import GRADIENTS, KINDS, Branch, ODEBlock, ResidualBlock
from resode.blocks.varying import Layers, drawn_values, stack_parameters
from resode.layers import BASES, BatchNorm, Conv2d, SolveContext, evaluate
from resode.layers.basis import Basis, knots_of
from resode.stack import Dropout, Stack

SMOOTH = Stack(norm="layer", activation="tanh")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def state(kind="preact", batch=3, channels=8, size=5):
    shape = (batch, channels) if kind == "mlp" else (batch, channels, size, size)
    return torch.randn(shape, dtype=torch.float64)


def varying(time, knots, stack=SMOOTH, kind="preact", channels=8):
    """A branch in float64 all of whose values are drawn, those that are constants at first, too."""
    branch = Branch(channels, stack, kind, time, knots=knots).double()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return branch


def frozen(branch, values):
    """The branch without time whose parameters are Σ_k values_k Θ_k."""
    still = Branch(branch.channels, branch.stack, branch.kind).double()
    with torch.no_grad():
        for own, stacked in zip(still.parameters(), branch.parameters(), strict=True):
            own.copy_(torch.tensordot(values, stacked, 1))
    return still.train(branch.training)


def twins(branch):
    """For each piece of a branch with constant pieces, the branch that it is."""
    return [frozen(branch, row) for row in torch.eye(branch.layers.basis.knots, dtype=torch.float64)]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- θ(t) in the place of θ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knots", [1, 4])
@pytest.mark.parametrize("time", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_at_t_is_the_branch_with_the_parameters_at_t(kind, time, knots):
    """At several times in one solve, so that nothing of one is left in the next; floats, tensors, and no context."""
    stack = Stack(norm="group", conv="standard" if kind == "mlp" else "weight-standardized")
    branch, h = varying(time, knots, stack, kind), state(kind)
    context = SolveContext()
    for t in (0.0, 0.1, 0.25, 0.6, 1.0, 0.1):
        as_tensor = torch.tensor(t, dtype=torch.float64)
        expected = frozen(branch, branch.layers.basis.values(as_tensor))(0.0, h)
        for found in (
            context.evaluate(branch, t, h),
            context.evaluate(branch, as_tensor, h),
            evaluate(branch, t, h),
            branch(t, h),
            branch(as_tensor, h),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("time", ["constant", "linear"])
def test_standardized_weights_with_dropconnect_are_those_of_t(time, gradient):
    """Neither of a piece that is over: Θ_1 = 0 is standardized to 0, and h stays as it is there."""
    stack = Stack(norm="none", conv="weight-standardized", dropout=Dropout("dropconnect", 0.3))
    branch, h = varying(time, 2, stack), state()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter[1] = 0.0
    context = SolveContext(detached=gradient != "backprop")
    assert context.evaluate(branch, 0.0, h).norm() > 0.1
    assert context.evaluate(branch, 1.0, h).norm() == 0.0


def test_dropconnect_drops_the_same_weights_at_every_time_of_a_solve():
    branch = varying("linear", 3, Stack(norm="none", dropout=Dropout("dropconnect", 0.5)), "mlp")
    used = []
    plain = nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.linear", lambda x, w, b: used.append(w.detach()) or plain(x, w, b))
        context = SolveContext()
        for t in (0.0, 0.3, 1.0):
            context.evaluate(branch, t, state("mlp"))
    first, *others = used[::2]  # the branch has two linear layers
    assert first.shape == branch.layers[0].weight.shape[1:]
    assert 0.3 < float((first == 0).double().mean()) < 0.7
    assert all(torch.equal(first == 0, other == 0) and not torch.equal(first, other) for other in others)


def test_the_basis_spans_what_it_is_told_to():
    branch, h = varying("linear", 3), state()
    expected = [branch(t, h) for t in (0.0, 0.25, 1.0)]
    assert branch.breakpoints == (0.5,)
    branch.set_span(-1.0, 3.0)
    assert branch.breakpoints == (1.0,)
    assert branch.layers.basis == Basis("linear", 3, -1.0, 3.0)
    for t, out in zip((-5.0, 0.0, 3.0), expected, strict=True):
        torch.testing.assert_close(branch(t, h), out)
    still = Branch(8)
    still.set_span(-1.0, 3.0)
    assert still.breakpoints == Branch(8, time="film").breakpoints == ()


@pytest.mark.parametrize("time", BASES)
def test_a_step_can_be_traced_with_times_whose_values_are_not_known(time):
    branch, h = varying(time, 4), state()

    def step(parameters, start, end, h):
        context = SolveContext()
        context.begin_step(start, end)
        return context.evaluate(lambda t, h: torch.func.functional_call(branch, parameters, (t, h)), start, h)

    def number(value):
        return torch.tensor(value, dtype=torch.float64)

    parameters = dict(branch.named_parameters())
    traced = make_fx(step, tracing_mode="fake")(parameters, number(0.0), number(0.25), h)
    for i in range(4):
        found = traced(parameters, number(i / 4), number((i + 1) / 4), h)
        torch.testing.assert_close(found, step(parameters, i / 4, (i + 1) / 4, h))


@pytest.mark.parametrize("time", BASES)
def test_a_step_that_will_be_traced_asks_the_context_for_nothing_that_depends_on_t(time):
    branch, h = varying(time, 3, Stack(norm="group", conv="weight-standardized")), state()
    context = SolveContext()
    context.begin_step(1 / 3, 2 / 3)
    expected = context.evaluate(branch, 1 / 3, h)
    context = SolveContext()
    context.begin_step(1 / 3, 2 / 3)
    context.inputs = {}
    torch.testing.assert_close(context.evaluate(branch, 1 / 3, h), expected)
    assert context.inputs == {}


def test_autocast_leaves_the_weights_of_norms_as_they_are():
    layers = varying("fourier", 4).float().layers
    exact = layers.parameters_at(0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layers.parameters_at(0.3)
    for name, value in exact.items():
        assert torch.equal(found[name], value)


# --- pieces are blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_euler_with_a_piece_a_step_is_the_untied_residual_net_in_outputs_and_gradients(kind, norm):
    N = 7
    branch = varying("constant", N, Stack(norm=norm), kind)
    blocks = twins(branch)
    continuous = ODEBlock(branch, "euler", steps=N)
    tied = nn.Sequential(*(ResidualBlock(branch, scale="1/L", t=i / N, depth=N) for i in range(N)))
    untied = nn.Sequential(*(ResidualBlock(block, scale="1/L", depth=N) for block in blocks))
    assert sum(p.numel() for p in continuous.parameters()) == sum(p.numel() for p in untied.parameters())
    x = state(kind)
    found = []
    for net in (untied, continuous, tied):
        branch.zero_grad()
        inputs = x.clone().requires_grad_()
        out = net(inputs)
        (out**3).sum().backward()
        gradients = [p.grad for p in branch.parameters()]
        if net is untied:
            by_block = zip(*map(nn.Module.parameters, blocks), strict=True)
            gradients = [torch.stack([p.grad for p in same]) for same in by_block]
        found.append([out.detach(), inputs.grad, *(g.clone() for g in gradients)])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert relative(one, expected) <= 1e-12


@pytest.mark.parametrize("time", ["constant", "linear"])
def test_each_value_is_drawn_as_a_branch_of_its_own(time):
    torch.manual_seed(1)
    branches = [Branch(8, kind="mlp") for _ in range(3)]
    torch.manual_seed(1)
    branch = Branch(8, kind="mlp", time=time, knots=3)
    for stacked, *own in zip(branch.parameters(), *map(nn.Module.parameters, branches), strict=True):
        assert torch.equal(stacked, torch.stack(own))
    assert branch.state_dict().keys() == branches[0].state_dict().keys()


def test_on_the_fourier_basis_a_branch_is_constant_at_first():
    torch.manual_seed(1)
    still = Branch(8, SMOOTH)
    torch.manual_seed(1)
    branch, h = Branch(8, SMOOTH, time="fourier", knots=5), state().float()
    for t in (0.0, 0.4, 1.0):
        torch.testing.assert_close(branch(t, h), still(t, h))


# --- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "knots"), [("constant", 4), ("linear", 5), ("fourier", 4)])
@pytest.mark.parametrize("kind", ["mlp", "preact"])
def test_rk4_keeps_its_order_when_the_breakpoints_are_points_of_its_grid(kind, time, knots):
    branch, x = varying(time, knots, Stack(norm="none", activation="tanh"), kind), state(kind)
    grids = (32, 64, 128)
    with torch.no_grad():
        exact = ODEBlock(branch, "rk4", 1024)(x)
        errors = [float((ODEBlock(branch, "rk4", n)(x) - exact).norm()) for n in grids]
    assert min(errors) > 1e-12
    assert np.polyfit(np.log(grids), np.log(errors), 1)[0] == pytest.approx(-4.0, abs=0.1)


@pytest.mark.parametrize(("time", "knots"), [("constant", 4), ("linear", 5)])
def test_a_grid_that_steps_over_a_breakpoint_is_refused(time, knots):
    with pytest.raises(InvalidInput, match=r"breakpoint t = 0\.25"):
        ODEBlock(varying(time, knots), "rk4", 6)


@pytest.mark.parametrize(("time", "knots"), [("constant", 3), ("linear", 4), ("fourier", 4)])
def test_an_adaptive_solver_reaches_its_tolerance(time, knots):
    branch, x = varying(time, knots, SMOOTH, "mlp"), state("mlp")
    with torch.no_grad():
        exact = ODEBlock(branch, "rk4", 768)(x)
        assert relative(ODEBlock(branch, "dopri5", rtol=1e-8, atol=1e-8)(x), exact) < 1e-6


@pytest.mark.parametrize(("time", "knots"), [("constant", 4), ("linear", 5), ("fourier", 4)])
@pytest.mark.parametrize("kind", ["mlp", "convnext"])
def test_the_gradient_modes_agree_on_a_fine_grid(kind, time, knots):
    branch, x = varying(time, knots, SMOOTH, kind), state(kind)
    found = []
    for gradient in GRADIENTS:
        branch.zero_grad()
        inputs = x.clone().requires_grad_()
        ODEBlock(branch, "rk4", 64, gradient=gradient)(inputs).square().sum().backward()
        found.append([inputs.grad, *(p.grad.clone() for p in branch.parameters())])
    for mode in found[1:]:
        for one, other in zip(found[0], mode, strict=True):
            assert relative(other, one) < 1e-5


def test_the_adjoint_may_meet_a_knot_that_the_forward_solve_did_not():
    """Euler's method evaluates at the left end of each step, and at the right end on the way back."""
    block = ODEBlock(varying("linear", 4), "euler", 3, gradient="adjoint")
    block(state()).square().sum().backward()
    assert all(p.grad[-1].norm() > 0 for p in block.parameters())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("kind", "time"), list(product(KINDS, BASES)))
def test_every_value_of_every_parameter_gets_a_gradient(kind, time, norm, gradient):
    block = ODEBlock(varying(time, 5, Stack(norm=norm, activation="tanh"), kind), "midpoint", 20, gradient=gradient)
    x = state(kind)
    (block(x) * torch.randn_like(x)).sum().backward()
    for parameter in block.parameters():
        each = parameter.grad.flatten(1).norm(dim=1)
        assert torch.isfinite(each).all()
        assert each.min() > 0


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("time", BASES)
def test_two_forwards_then_two_backwards_give_the_gradients_of_each(time, gradient):
    stack = Stack(conv="weight-standardized", activation="tanh", dropout=Dropout("unit", 0.3))
    block = ODEBlock(varying(time, 3, stack), "rk4", 6, gradient=gradient)
    xs = [state(), state()]

    def losses():
        torch.manual_seed(3)
        return [block(x).square().sum() for x in xs]

    def gradients(loss):
        block.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in block.parameters()]

    together = losses()
    separate = [gradients(losses()[i]) for i in (0, 1)]
    for i in (1, 0):
        for one, other in zip(gradients(together[i]), separate[i], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("time", BASES)
def test_traced_steps_have_the_parameters_of_their_own_pieces(time, gradient, monkeypatch):
    """One graph for all steps: of the step that it was traced from, nothing but its form may be left."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    stack = Stack(norm="group", conv="weight-standardized", activation="tanh")
    branch, x = varying(time, knots_of(time, 3), stack), state()
    found = []
    for traced in (False, True):
        block = ODEBlock(branch, "rk4", 6, gradient=gradient, compile=traced)
        for _ in range(2):
            branch.zero_grad()
            out = block(x)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in branch.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative(other, one) < 1e-10


def test_in_one_solve_each_parameter_is_unbound_once():
    """One stack of gradients in the backward pass, where a selection a stage would fill the whole K·stages times."""
    block = ODEBlock(varying("constant", 4), "rk4", 8)
    nodes, seen = [block(state()).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = [node.name() for node in seen]
    assert names.count("UnbindBackward0") == len(list(block.parameters()))
    assert not any(name.startswith(("Select", "Lerp")) for name in names)


def test_statistics_of_batch_norms_are_functions_of_t_as_ever():
    branch = varying("constant", 2, Stack())
    block = ODEBlock(branch, "rk4", 2)
    block(state())
    norm = next(layer for layer in branch.modules() if isinstance(layer, BatchNorm))
    assert norm.running_mean.shape == (3, 8)
    block.eval()
    assert torch.isfinite(block(state())).all()


# --- an ordinary module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", BASES)
def test_an_evaluation_leaves_the_module_as_it_was(time):
    branch, h = varying(time, 3), state()
    before = dict(branch.named_parameters())

    def unharmed():
        assert dict(branch.named_parameters()).keys() == before.keys()
        assert all(p is before[name] for name, p in branch.named_parameters())
        assert all(type(p) is nn.Parameter and p.is_leaf for p in branch.parameters())

    block = ODEBlock(branch, "rk4", 6)
    block(h).sum().backward()
    unharmed()
    context = SolveContext()

    def broken(module, inputs):
        raise RuntimeError("broken on purpose")

    handle = branch.layers[-1].register_forward_pre_hook(broken)
    for call in (lambda: block(h), lambda: branch(0.3, h), lambda: context.evaluate(branch, 0.3, h)):
        with pytest.raises(RuntimeError, match="on purpose"):
            call()
        unharmed()
    assert not context.weights_vary
    handle.remove()
    torch.testing.assert_close(context.evaluate(branch, 0.3, h), branch(0.3, h))


@pytest.mark.parametrize("time", BASES)
def test_copies_averages_and_saved_states_are_the_module_again(time):
    block, x = ODEBlock(varying(time, 3, Stack()), "rk4", 6), state()
    block(x).sum().backward()
    twin, average = copy.deepcopy(block), AveragedModel(block)
    fresh = ODEBlock(Branch(8, time=time, knots=3).double(), "rk4", 6)
    fresh.load_state_dict(block.state_dict())
    average.update_parameters(block)
    for module in (block, twin, average, fresh):
        assert torch.equal(module.eval()(x), block.eval()(x))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin(x), block(x))


def test_functional_call_may_put_other_stacks_in_the_place_of_its_own():
    block, other, x = (ODEBlock(varying("linear", 3), "rk4", 4), varying("linear", 3), state())
    given = {f"branch.{name}": p.detach() for name, p in other.named_parameters()}
    expected = ODEBlock(other, "rk4", 4)(x)
    torch.testing.assert_close(torch.func.functional_call(block, given, (x,)), expected)
    assert not torch.equal(block(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func's own
def test_second_derivatives_and_forward_mode_pass():
    block, x = ODEBlock(varying("linear", 3, SMOOTH, "mlp"), "rk4", 2), state("mlp", batch=1)
    weight = block.branch.layers[0].weight

    def f(w):
        return torch.func.functional_call(block, {"branch.layers.0.weight": w}, (x,)).square().sum()

    tangent = torch.randn_like(weight)
    forward = torch.func.jvp(torch.func.grad(f), (weight.detach(),), (tangent,))[1]
    (first,) = torch.autograd.grad(f(weight), weight, create_graph=True)
    (backward,) = torch.autograd.grad((first * tangent).sum(), weight)
    torch.testing.assert_close(forward, backward)


# --- stacking --------------------------------------------------------------------------------------------------------


def test_any_layers_can_be_stacked_shared_ones_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.randn(()))
            self.third = nn.Linear(4, 4, bias=False)
            self.third.weight = self.one.weight

        def forward(self, h):
            return self.third(self.one(self.other(h))) * self.scale

    modules = [Twice().double() for _ in range(3)]
    originals = copy.deepcopy(modules)
    stack_parameters([Layers([module]) for module in modules], 3)
    layers = Layers([modules[0]], Basis("constant", 3))
    h = torch.randn(2, 4, dtype=torch.float64)
    assert len(list(layers.parameters())) == 3
    for k, original in enumerate(originals):
        torch.testing.assert_close(layers.at((k + 0.5) / 3, h), original(h))
    assert [tuple(p.shape) for p in layers.parameters()] == [(3,), (3, 4, 4), (3, 4)]


def test_stacks_keep_what_is_frozen_and_begin_with_zeros_beyond_the_last_module():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    one.bias.requires_grad_(False)
    weights = [one.weight.detach().clone(), two.weight.detach().clone()]
    stacked = stack_parameters([one, two], 3)
    assert stacked is one
    assert torch.equal(stacked.weight, torch.stack([*weights, torch.zeros(2, 2)]))
    assert stacked.weight.requires_grad
    assert not stacked.bias.requires_grad


def test_modules_that_differ_or_are_too_many_cannot_be_stacked():
    for modules in ([nn.Linear(2, 2), nn.Linear(2, 3)], [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]):
        with pytest.raises(InvalidInput, match="same names and shapes"):
            stack_parameters(modules, 2)
    with pytest.raises(InvalidInput, match="3 modules for 2 knots"):
        stack_parameters([nn.Linear(2, 2) for _ in range(3)], 2)


def test_what_is_drawn_are_views_of_each_value():
    model = nn.Sequential(Branch(4, time="linear", knots=3), Branch(4, time="fourier", knots=3), Branch(4))
    drawn = drawn_values(model)
    for branch, count in zip(model, (3, 1, 0), strict=True):
        for parameter in branch.parameters():
            views = drawn.get(parameter, [])
            assert len(views) == count
            for k, view in enumerate(views):
                view.fill_(k + 1.0)
                assert (parameter[k] == k + 1.0).all()
    weight = next(layer for layer in model[0].modules() if isinstance(layer, Conv2d)).weight
    assert all(b - a == 1.0 for a, b in pairwise(weight.detach().flatten(1)[:, 0].tolist()))
