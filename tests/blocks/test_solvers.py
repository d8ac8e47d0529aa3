"""Explicit Runge–Kutta methods on fixed grids: order, exactness, grids, breakpoints, counts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resode.blocks.ode import ODEBlock
from resode.blocks.solvers import TABLEAUX, FixedGrid, Solve, check_breakpoints, uniform_grid
from resode.errors import InvalidInput
from resode.layers.context import SolveContext, interval_time


def arrays(tableau):
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row
    return a, np.array(tableau.b), np.array(tableau.c)


def conditions(a, b, c):
    """The order conditions of the rooted trees of each order (Hairer, Nørsett & Wanner I, table II.2.1)."""
    return {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        5: [(b @ c**4, 1 / 5)],
    }


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_a_tableau_meets_the_conditions_of_its_order_and_no_more(tableau):
    a, b, c = arrays(tableau)
    np.testing.assert_allclose(a.sum(1), c)  # the stages are consistent
    found = conditions(a, b, c)
    for order in range(1, tableau.order + 1):
        for value, expected in found[order]:
            assert value == pytest.approx(expected, abs=1e-14)
    assert any(abs(value - expected) > 1e-3 for value, expected in found[tableau.order + 1])


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_a_tableau_is_explicit(tableau):
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    assert len(tableau.c) == tableau.stages


class Function(nn.Module):
    """A field given by a function of (t, h), which notes the times it is asked at."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function, self.times = function, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        self.times.append(float(t))
        return self.function(t, h)


def solve(tableau, grid, function, h):
    f = Solve(Function(function), SolveContext(grid[0], grid[-1]))
    return FixedGrid(tableau, tuple(grid)).integrate(f, torch.as_tensor(h, dtype=torch.float64))


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
@given(
    coefficients=st.lists(st.floats(-3, 3), min_size=4, max_size=4), steps=st.integers(1, 5), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_polynomials_in_time_below_the_order_are_integrated_exactly(tableau, coefficients, steps, seed):
    derivative = np.polynomial.Polynomial(coefficients[: tableau.order])  # of degree order − 1
    inner = np.sort(np.random.default_rng(seed).uniform(-1.0, 2.0, steps - 1))
    grid = [-1.0, *inner.tolist(), 2.0]
    primitive = derivative.integ()
    found = solve(tableau, grid, lambda t, h: torch.full_like(h, derivative(t)), [[0.7]])
    assert found.item() == pytest.approx(0.7 + primitive(2.0) - primitive(-1.0), abs=1e-11)


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_a_step_of_a_linear_field_is_the_taylor_polynomial_of_its_order(tableau):
    """For s = p stages the stability function is Σ_{k≤p} z^k/k!."""
    z = -0.8
    found = solve(tableau, [0.0, 1.0], lambda t, h: z * h, [[1.0]]).item()
    terms = np.cumprod([1.0, *(z / k for k in range(1, tableau.order + 1))])
    assert found == pytest.approx(terms.sum(), abs=1e-14)


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_the_error_falls_with_the_order(tableau):
    """dh/dt = −2t·h² + cos(t)-driven part with the closed form h = 1/(1 + t²) + sin t."""

    def field(t, h):
        t = torch.as_tensor(t, dtype=torch.float64)
        return -2 * t * (h - torch.sin(t)) ** 2 + torch.cos(t)

    exact = 1 / (1 + 1.5**2) + np.sin(1.5)
    counts = [16, 32, 64]
    errors = [abs(solve(tableau, uniform_grid(0.0, 1.5, n), field, [[1.0]]).item() - exact) for n in counts]
    slopes = [np.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([tableau.order] * 2, abs=0.2)


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


@pytest.mark.parametrize("steps", [1, 3, 10, 49, 98, 196])
def test_a_solve_makes_exactly_its_steps(steps):
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


def test_a_block_refuses_a_grid_that_steps_over_a_breakpoint():
    field = Function(lambda t, h: -h, breakpoints=(0.25, 0.5))
    ODEBlock(field, "rk4", steps=4)
    with pytest.raises(InvalidInput, match=r"6 steps from 0 to 1 .*t = 0\.25"):
        ODEBlock(field, "rk4", steps=6)
    block = ODEBlock(field, "rk4", steps=8)
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


def test_the_order_survives_a_jump_on_the_grid():
    """f jumps at t = ½; rk4 keeps order 4 when every stage uses its step's own piece."""

    def field(t, h):
        return (-3.0 if interval_time(t) > 0.5 else 1.0) * h

    exact = np.exp(0.5 - 1.5)
    errors = []
    for steps in (16, 32, 64):
        block = ODEBlock(Function(field, breakpoints=(0.5,)), "rk4", steps=steps)
        errors.append(abs(block(torch.ones(1, 1, dtype=torch.float64)).item() - exact))
    assert [np.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([4, 4], abs=0.3)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_the_counts_of_a_fixed_grid_are_exact(tableau, gradient):
    field = Function(lambda t, h: torch.tanh(h))
    block = ODEBlock(field, tableau.name, steps=5, gradient=gradient)
    out = block(torch.ones(2, 3, requires_grad=True))
    stats = block.stats
    assert (stats.nfe_forward, stats.nfe_backward) == (5 * tableau.stages, 0)
    assert (stats.accepted, stats.rejected) == (5, 0)
    assert len(field.times) == stats.nfe_forward
    out.sum().backward()
    assert stats.nfe_backward == (5 * tableau.stages if gradient == "adjoint" else 0)
    assert len(field.times) == stats.nfe_forward + stats.nfe_backward
    assert (stats.accepted, stats.nfe_forward) == (5, 5 * tableau.stages)
    block(torch.ones(2, 3))
    assert block.stats.nfe_forward == 5 * tableau.stages, "of the last solve, not of all"
