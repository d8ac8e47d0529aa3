"""Explicit Runge–Kutta methods on fixed grids: order, exactness, grids, breakpoints, counts, and what a solve asks of
the device."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from fields import Function
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import SYNCS, Operations
from scipy.special import ellipj
from torch import nn
from torch._subclasses import FakeTensorMode

from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.solvers import FixedGrid, RungeKutta, Solve, Trial, check_breakpoints, uniform_grid
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput
from resode.layers.context import SolveContext, interval_time

ALL = pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)


def solve(tableau, grid, function, h):
    f = Solve(Function(function), SolveContext(grid[0], grid[-1]))
    state = (torch.as_tensor(h, dtype=torch.float64),)
    return FixedGrid(tableau, tuple(grid)).integrate(f, state, RungeKutta(tableau))[0]


@ALL
@given(
    coefficients=st.lists(st.floats(-3, 3), min_size=8, max_size=8), steps=st.integers(1, 5), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_polynomials_in_time_below_the_order_are_integrated_exactly(tableau, coefficients, steps, seed):
    derivative = np.polynomial.Polynomial(coefficients[: tableau.order])  # of degree order − 1
    inner = np.sort(np.random.default_rng(seed).uniform(-1.0, 2.0, steps - 1))
    grid = [-1.0, *inner.tolist(), 2.0]
    primitive = derivative.integ()
    found = solve(tableau, grid, lambda t, h: torch.full_like(h, derivative(t)), [[0.7]])
    assert found.item() == pytest.approx(0.7 + primitive(2.0) - primitive(-1.0), abs=1e-10)


@ALL
def test_a_step_of_a_linear_field_is_the_exponential_to_its_order(tableau):
    """The stability function is Σ_{k≤p} z^k/k! with as many stages as the order p, and within O(z^(p+1)) with more."""
    z, p = -0.125, tableau.order
    found = solve(tableau, [0.0, 1.0], lambda t, h: z * h, [[1.0]]).item()
    terms = np.cumprod([1.0, *(z / k for k in range(1, p + 2))])
    beyond = 0.0 if tableau.solution_stages == p else 2.0 * abs(terms[-1])
    assert abs(found - terms[:-1].sum()) <= beyond + 1e-15


def rigid_body(t, h):
    """Euler's equations of a rigid body: h = (sn t, cn t, dn t), Jacobi's elliptic functions with m = 0.51."""
    a, b, c = h.unbind(-1)
    return torch.stack([b * c, -a * c, -0.51 * a * b], -1)


def hastened(t, h):
    """The same, in the time τ = t + t²/2."""
    return (1.0 + t) * rigid_body(t, h)


SMOOTH = {"autonomous": (rigid_body, 1.5), "time-dependent": (hastened, 1.0)}
"""Fields, and the times at which h = (sn 1.5, cn 1.5, dn 1.5)."""
COUNTS = {
    1: (256, 512, 1024), 2: (64, 128, 256), 3: (48, 96, 192), 4: (32, 64, 128), 5: (24, 32, 48, 64), 8: (3, 4, 6, 8),
}  # fmt: skip
"""Numbers of steps by order: enough to be asymptotic, and few enough for errors above 1e-12."""


@pytest.mark.parametrize("problem", SMOOTH)
@ALL
def test_the_error_falls_with_the_order(tableau, problem):
    (field, end), exact, counts = SMOOTH[problem], ellipj(1.5, 0.51)[:3], COUNTS[tableau.order]
    found = [solve(tableau, uniform_grid(0.0, end, n), field, [0.0, 1.0, 1.0]).numpy() for n in counts]
    errors = [np.linalg.norm(each - exact) for each in found]
    seen = [(n, e) for n, e in zip(counts, errors, strict=True) if e > 1e-12]
    assert len(seen) >= 3
    order = -np.polyfit(*np.log(seen).T, 1)[0]
    assert order == pytest.approx(tableau.order, abs=0.1 if tableau.order <= 4 else 0.5)


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.1, 0.7), (-1.0, 2.0), (1e3, 1e3 + 1 / 3)])
def test_a_uniform_grid_has_its_number_of_steps_and_its_ends(t0, t1):
    for steps in range(1, 513):
        grid = uniform_grid(t0, t1, steps)
        assert len(grid) == steps + 1
        assert (grid[0], grid[-1]) == (t0, t1)
        widths = np.diff(grid)
        assert (widths > 0).all()
        np.testing.assert_allclose(widths, (t1 - t0) / steps, rtol=1e-9 if abs(t0) < 10 else 1e-6)


@pytest.mark.parametrize("t1", [1.0, 0.7, 1 / 3])
def test_a_solve_makes_exactly_its_steps_for_every_number_up_to_512(t1):
    block = ODEBlock(Function(lambda t, h: h), "euler", t1=t1)
    f = Solve(block.branch, SolveContext(0.0, t1))
    for steps in range(1, 513):
        made = []

        def step(f, start, end, state, made=made):
            made.append((start, end))
            return Trial(state)

        block.steps = steps
        block.scheme().integrate(f, (torch.zeros(1),), step)
        assert len(made) == steps
        assert (made[0][0], made[-1][1]) == (0.0, t1)
        assert all(one[1] == other[0] for one, other in pairwise(made))  # to the bit


@pytest.mark.parametrize("steps", [1, 3, 10, 49])
def test_the_stages_of_a_step_stand_at_its_ends(steps):
    field = Function(lambda t, h: torch.ones_like(h))
    block = ODEBlock(field, "heun", steps=steps)
    assert block(torch.zeros(1, 1, dtype=torch.float64)).item() == pytest.approx(1.0, abs=1e-12)
    assert len(field.times) == 2 * steps
    assert (field.times[0], field.times[-1]) == (0.0, 1.0)
    assert field.times[1::2][:-1] == field.times[2::2]  # a step ends where the next begins, to the bit


def test_a_step_ends_on_its_end_to_the_bit():
    """−0.3 + (0.1 − (−0.3)) is 0.10000000000000003: beyond the end, where f may not exist."""
    field = Function(lambda t, h: torch.ones_like(h))
    ODEBlock(field, "heun", steps=1, t0=-0.3, t1=0.1)(torch.zeros(1, 1))
    assert field.times == [-0.3, 0.1]


# --- breakpoints -----------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 60), at=st.integers(1, 59))
def test_a_breakpoint_on_the_grid_is_accepted_and_one_between_is_refused(steps, at):
    grid = uniform_grid(0.0, 1.0, steps)
    check_breakpoints(grid, [at / steps] if at < steps else [1.0 + at])  # beyond the ends it concerns nobody
    with pytest.raises(InvalidInput, match=rf"grid of {steps} steps.*breakpoint"):
        check_breakpoints(grid, [(at % steps + 0.5) / steps])


def test_a_breakpoint_that_misses_its_point_by_rounding_is_on_it():
    check_breakpoints(uniform_grid(0.0, 1.0, 10), [0.1 + 0.2, 0.7 - 1e-12])


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_block_refuses_a_grid_that_steps_over_a_breakpoint(solver):
    field = Function(lambda t, h: -h, breakpoints=(0.25, 0.5))
    ODEBlock(field, solver, steps=4)
    with pytest.raises(InvalidInput, match=r"6 steps from 0 to 1 .*t = 0\.25"):
        ODEBlock(field, solver, steps=6)
    block = ODEBlock(field, solver, steps=8)
    block.steps = 7
    with pytest.raises(InvalidInput, match="7 steps"):
        block(torch.ones(1, 1))


def test_mask_intervals_are_breakpoints_in_training_alone():
    field = Function(lambda t, h: -h)
    with pytest.raises(InvalidInput, match="8 steps"):
        ODEBlock(field, "rk4", steps=8, mask_intervals=3)
    block = ODEBlock(field, "rk4", steps=6, mask_intervals=3).eval()
    block.steps = 8
    block(torch.ones(1, 1))


@pytest.mark.parametrize("solver", ["bosh3", "rk4", "dopri5"])
def test_the_order_survives_a_jump_on_the_grid(solver):
    """f jumps at ½; a method keeps its order when every stage uses its step's own piece, and has order 1 otherwise."""

    def field(t, h):
        return (-3.0 if interval_time(t) > 0.5 else 1.0) * h

    exact = np.exp(0.5 - 1.5)
    errors = []
    for steps in (16, 32, 64):
        block = ODEBlock(Function(field, breakpoints=(0.5,)), solver, steps=steps)
        errors.append(abs(block(torch.ones(1, 1, dtype=torch.float64)).item() - exact))
    slopes = [np.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([TABLEAUX[solver].order] * 2, abs=0.3)


# --- counts ----------------------------------------------------------------------------------------------------------

EVALUATIONS = {
    "euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "rk4": 4, "rk4-38": 4,
    "bosh3": 3, "tsit5": 6, "dopri5": 6, "dopri8": 13, "adaptive_heun": 2,
}  # fmt: skip
"""A step of a fixed grid: the stages that serve the error estimate alone are left out."""


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", TABLEAUX)
def test_the_counts_of_a_fixed_grid_are_exact(solver, gradient):
    field = Function(lambda t, h: torch.tanh(h))
    block = ODEBlock(field, solver, steps=5, gradient=gradient)
    out = block(torch.ones(2, 3, requires_grad=True))
    stats, forward = block.stats, 5 * EVALUATIONS[solver] * (2 if gradient == "reversible" else 1)
    assert (stats.nfe_forward, stats.nfe_backward) == (forward, 0)
    assert (stats.accepted, stats.rejected) == (5, 0)
    assert len(field.times) == stats.nfe_forward
    out.sum().backward()
    assert stats.nfe_backward == (0 if gradient == "backprop" else forward)
    assert len(field.times) == stats.nfe_forward + stats.nfe_backward
    assert (stats.accepted, stats.nfe_forward) == (5, forward)
    block(torch.ones(2, 3))
    assert block.stats.nfe_forward == forward, "of the last solve, not of all"


# --- what a solve asks of the device ---------------------------------------------------------------------------------


class Elementwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(-0.7))

    def forward(self, t, h):
        return torch.tanh(self.rate * h) * (1.0 + t)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", TABLEAUX)
def test_a_fixed_grid_never_waits_for_the_device(solver, gradient):
    block, x = ODEBlock(Elementwise(), solver, steps=3, gradient=gradient), torch.ones(2, 3, requires_grad=True)
    with Operations() as seen:
        block(x).sum().backward()
    assert seen.count("tanh") == block.stats.nfe_forward + block.stats.nfe_backward
    assert seen.count(*SYNCS) == 0


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_fixed_grid_runs_on_tensors_that_have_no_values(gradient):
    """On fake tensors anything that looks at a value raises."""
    with FakeTensorMode():
        block, x = ODEBlock(Elementwise(), "rk4", steps=3, gradient=gradient), torch.ones(2, 3, requires_grad=True)
        block(x).sum().backward()
        assert x.grad.shape == (2, 3)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            x.sum().item()


@pytest.mark.parametrize("solver", TABLEAUX)
def test_stages_are_summed_without_a_stacked_tensor(solver):
    block, x = ODEBlock(Elementwise(), solver, steps=3), torch.ones(5, 7, requires_grad=True)
    with Operations() as seen:
        block(x).sum().backward()
    assert seen.count("stack", "cat", "_stack", "_cat") == 0
    assert seen.largest == x.numel()
