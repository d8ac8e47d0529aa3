"""Projected dynamics: Euler's steps, a projection after each, and no other solver."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from resode import Branch, InvalidInput, ODEBlock, Stack, collect_penalties, dynamics, solver_settings
from resode.blocks import ProjectedODE
from resode.layers import Dropout


class Wave(nn.Module):
    """f(t, h) = sin(h W + t) − 1."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=generator))

    def forward(self, t, h):
        return torch.sin(h @ self.weight + t) - 1.0


def states(count=6):
    return torch.rand(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive(f, h, grid):
    """h ← ReLU(h + Δ f(t, h)) along ``grid``."""
    for a, b in pairwise(grid):
        h = torch.relu(h + (b - a) * f(a, h))
    return h


def test_each_step_of_eulers_is_followed_by_the_projection():
    block, x = ProjectedODE(Wave(), nn.ReLU(), 5, t0=0.5, t1=2.0), states()
    grid = [0.5 + 0.3 * i for i in range(6)]
    mine = copy.deepcopy(block.branch)
    out, expected = block(x), naive(mine, x, grid)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out == 0).any(), "the projection acts"
    assert (ODEBlock(Wave(), "euler", 5, t0=0.5, t1=2.0)(x) < 0).any()
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(block.branch.weight.grad, mine.weight.grad, rtol=1e-12, atol=1e-12)
    assert block.stats.nfe_forward == block.stats.accepted == 5


def test_its_trajectory_is_projected_too():
    block, x = ProjectedODE(Wave(), nn.ReLU(), 4), states()
    path = block.trajectory(x, [0.0, 0.25, 0.6, 1.0])
    expected = [x, naive(block.branch, x, [0, 0.25]), naive(block.branch, x, [0, 0.25, 0.5, 0.6])]
    expected.append(naive(block.branch, x, [0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(path, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path[-1], block(x))
    assert block.accepted_grid(x) == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_what_is_integrated_along_is_not_projected():
    x = states()
    block = ProjectedODE(Wave(), nn.ReLU(), 3, kinetic=2.0)
    with collect_penalties() as penalties:
        block(x)
    h, expected = x, 0.0
    for t in (0, 1 / 3, 2 / 3):
        slope = block.branch(t, h)
        expected = expected + 2.0 / 3 * slope.square().mean()
        h = torch.relu(h + slope / 3)
    torch.testing.assert_close(penalties[0], expected, rtol=1e-12, atol=1e-12)


def test_masks_and_statistics_are_those_of_an_ode_block():
    """With a projection that does nothing it is the ODE block of Euler's method."""
    torch.manual_seed(0)
    branch = nn.ModuleList([Branch(4, Stack(activation="relu")), Dropout(0.3)])

    class Both(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, t, h):
            return self.parts[1](self.parts[0](t, h))

    one = ODEBlock(Both(branch), "euler", 4, mask_intervals=2)
    other = ProjectedODE(copy.deepcopy(one.branch), nn.Identity(), 4, mask_intervals=2)
    x, outputs = torch.randn(3, 4, 5, 5), []
    for block in (one, other):
        torch.manual_seed(1)
        outputs.append(block(x))
    assert torch.equal(*outputs)
    held = other.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in one.state_dict().items())


def test_dynamics_reads_the_projection_as_what_follows_the_sum():
    net, x = nn.Sequential(ProjectedODE(Wave(), nn.ReLU(), 3)), states()
    view = dynamics(net, x)
    assert [type(step.post) for step in view.steps] == [nn.ReLU] * 3
    with torch.no_grad():
        torch.testing.assert_close(view(x), net(x))
    finer = dynamics(net, x, grid=6)
    with torch.no_grad():
        torch.testing.assert_close(finer(x), naive(net[0].branch, x, [i / 6 for i in range(7)]))


@pytest.mark.parametrize("solver", ["rk4", "heun", "dopri5", "explicit_adams"])
def test_no_other_solver_makes_them(solver):
    says = f"solver='euler' alone, and '{solver}' was asked for"
    with pytest.raises(InvalidInput, match=says):
        ProjectedODE(Wave(), nn.ReLU(), 3, solver=solver)
    net = nn.Sequential(ProjectedODE(Wave(), nn.ReLU(), 3))
    with solver_settings(net, solver=solver, steps=2):
        with pytest.raises(InvalidInput, match=says):
            net(states())
        with pytest.raises(InvalidInput, match=says):
            dynamics(net, grid=4)
    net(states())


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "reversible"])
def test_no_other_gradient_mode_knows_the_projection(gradient):
    with pytest.raises(InvalidInput, match=f"gradient='backprop', not '{gradient}'"):
        ProjectedODE(Wave(), nn.ReLU(), 3, gradient=gradient)


def test_it_has_no_inverse():
    with pytest.raises(InvalidInput, match="no inverse: the ReLU after each step"):
        ProjectedODE(Wave(), nn.ReLU(), 3).inverse(states())


def test_a_projection_must_keep_the_shape():
    with pytest.raises(InvalidInput, match=r"the projection turns a state of shape \(6, 4\) into \(6, 2\)"):
        ProjectedODE(Wave(), nn.Linear(4, 2, dtype=torch.float64), 3)(states())
