"""Gradient mode ``checkpoint``: backpropagation's gradient, from the states at the accepted steps alone."""

import math
import weakref

import pytest
import torch
from torch import nn

from resode.blocks.ode import ODEBlock
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Bump(nn.Module):
    """f(t, h) = tanh(h W)·(1 + 20·exp(−((t − 0.6)/0.1)²)), whose bump makes an error control reject steps."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.3 * randn(4, 4, seed=1))

    def forward(self, t, h):
        return torch.tanh(h @ self.W) * (1.0 + 20.0 * math.exp(-(((t - 0.6) / 0.1) ** 2)))


def solved(solver="rk4", gradient="checkpoint", **settings):
    block, x = ODEBlock(Bump(), solver, gradient=gradient, **settings), randn(3, 4).requires_grad_()
    return block, x, block(x)


TIGHT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_backward_pass_evaluates_the_stages_of_each_step_once_more(solver):
    """Those of the solution: the one that serves the error estimate alone is not made again."""
    block, _, out = solved(solver, steps=5)
    out.sum().backward()
    assert block.stats.nfe_forward == block.stats.nfe_backward == 5 * TABLEAUX[solver].solution_stages


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_steps_that_were_rejected_are_neither_kept_nor_made_again(solver):
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.shape == (3, 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block, _, out = solved(solver, **TIGHT)
    assert block.stats.rejected > 0
    assert kept == block.stats.accepted
    out.sum().backward()
    assert block.stats.nfe_backward == block.stats.accepted * TABLEAUX[solver].solution_stages


class Box:
    """A tensor that a graph holds."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_held(run):
    """How many tensors the graphs made by ``run`` held at once, at most."""
    live, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        box = Box(tensor)
        live.add(box)
        most = max(most, len(live))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        run()
    return most


def test_the_backward_pass_holds_the_graph_of_one_step_at_a_time():
    def backward(steps):
        _, _, out = solved(steps=steps)
        return most_held(out.sum().backward)

    assert backward(32) == backward(1) > 4
    assert most_held(lambda: solved(gradient="backprop", steps=32)) > 8 * backward(32)


def test_without_a_backward_pass_no_state_is_kept():
    class Watched(Bump):
        def __init__(self):
            super().__init__()
            self.given, self.most = weakref.WeakSet(), 0

        def forward(self, t, h):
            self.given.add(h)
            self.most = max(self.most, len(self.given))
            return super().forward(t, h)

    def most_states(steps):
        block = ODEBlock(Watched(), "euler", steps, gradient="checkpoint")
        with torch.no_grad():
            block(randn(3, 4))
        return block.branch.most

    assert most_states(32) == most_states(2) <= 2


@pytest.mark.parametrize("settings", [{"steps": 8}, {"solver": "dopri5", **TIGHT}])
def test_the_gradient_of_a_trajectory_is_backpropagations(settings):
    found = []
    for gradient in ("backprop", "checkpoint"):
        block, x = ODEBlock(Bump(), gradient=gradient, **settings), randn(3, 4).requires_grad_()
        states = block.trajectory(x, [0.0, 0.3, 0.5, 1.0])
        loss = (states * randn(*states.shape, seed=5)).sum()
        found.append(torch.autograd.grad(loss, (x, *block.parameters())))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
