"""The ODE block: the branches it takes and refuses, and its life as an ordinary module."""

import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from fields import Field, Linear, randn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resode.blocks.branch import Branch
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.blocks.settings import GRADIENTS, SOLVERS
from resode.blocks.tableaux import ADAPTIVE
from resode.errors import InvalidInput
from resode.layers.context import interval_time
from resode.layers.norm import BatchNorm
from resode.stack import Dropout, Stack

# --- branches that are refused ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("make", [ResidualBlock, ODEBlock])
def test_so_is_one_of_a_residual_block_further_in(make):
    """What it overwrites is the output of another layer: neither the state nor anything that autograd looks after."""

    class Deeper(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.first, self.block = nn.Linear(4, 4).double(), ResidualBlock(ChangesItsInput(inplace))

        def forward(self, t, h):
            return self.block(self.first(h))

    x = randn(3, 4)
    make(Deeper(False))(x)
    with pytest.raises(InvalidInput, match="inplace=False"):
        make(Deeper(True))(x)


@pytest.mark.parametrize("x", [torch.full((1, 2), 10), torch.ones(1, 2, dtype=torch.bool)])
def test_a_state_of_whole_numbers_is_refused(x):
    """Its evaluations, in its type, would be rounded: dh/dt = −h from 10 would come to 4."""

    class Decay(nn.Module):
        def forward(self, t, h):
            return -1 * h

    block = ODEBlock(Decay())
    for run in (block, block.inverse, block.accepted_grid, lambda x: block.trajectory(x, [1.0])):
        with pytest.raises(InvalidInput, match=rf"a state of {x.dtype} .*x\.float\(\)"):
            run(x)


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
