"""Gradient mode ``reversible``: a scheme that can be undone, and the exact gradient of that scheme."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from experiments.gradient_product import difference, reversible_by_autograd
from resode.blocks.gradients import Gradients, integrate
from resode.blocks.ode import ODEBlock
from resode.blocks.reversible import Reversible, ReversibleStep
from resode.blocks.solvers import FixedGrid, RungeKutta, Solve, uniform_grid
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.layers.context import SolveContext


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Field(nn.Module):
    """f(t, h) = 0.3·tanh(h W + b) V·(1 + t²)"""

    def __init__(self):
        super().__init__()
        self.W, self.V = nn.Parameter(randn(4, 4, seed=1)), nn.Parameter(randn(4, 4, seed=2))
        self.b = nn.Parameter(randn(4, seed=3))

    def forward(self, t, h):
        return 0.3 * torch.tanh(h @ self.W + self.b) @ self.V * (1.0 + t**2)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(solve, field, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(torch.sin(solve(x)).sum(), (x, *field.parameters()))


# --- the scheme ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_one_step_is_that_of_the_paper(tableau):
    """y' = λy + (1 − λ)z + Ψ_Δ(t, z), z' = z − Ψ_−Δ(t + Δ, y'), with Ψ the increment of a plain step."""
    f, y, z, t, end, coupling = Solve(Field(), SolveContext()), randn(3, 4), randn(3, 4, seed=5), 0.2, 0.5, 0.9

    def increment(start, stop, h):
        (after,) = FixedGrid(tableau, (start, stop)).integrate(f, (h,), RungeKutta(tableau))
        return after - h

    with torch.no_grad():
        y_end = coupling * y + (1.0 - coupling) * z + increment(t, end, z)
        z_end = z - increment(end, t, y_end)
        found = ReversibleStep(tableau, coupling)(f, t, end, (y, z)).state
    for part, expected in zip(found, (y_end, z_end), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("coupling", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=TABLEAUX)
def test_undoing_the_steps_comes_back_to_the_start(tableau, coupling):
    f, step = Solve(Field().requires_grad_(False), SolveContext()), ReversibleStep(tableau, coupling)
    start = (randn(3, 4), randn(3, 4, seed=5))
    grid = uniform_grid(0.0, 1.0, 8)
    with torch.no_grad():
        state = end = FixedGrid(tableau, grid).integrate(f, start, step)
    assert relative(end[0], start[0]) > 0.1
    zeros = tuple(torch.zeros_like(part) for part in start)
    for i in reversed(range(8)):
        state, _ = step.undo(f, grid[i], grid[i + 1], state, zeros, Gradients(()))
    for found, expected in zip(state, start, strict=True):
        assert relative(found, expected) < 1e-13


# Beyond, this field shows no slope before rounding does.
ORDERS = {name: tableau for name, tableau in TABLEAUX.items() if tableau.order <= 4}


@pytest.mark.parametrize("coupling", [1.0, 0.99])
@pytest.mark.parametrize("tableau", ORDERS.values(), ids=ORDERS)
def test_the_scheme_converges_at_the_order_of_its_tableau(tableau, coupling):
    field, x, counts = Field(), randn(3, 4), [32, 64, 128]
    with torch.no_grad():
        exact = ODEBlock(field, "dopri8", steps=64)(x)
        solve = lambda n: ODEBlock(field, tableau.name, n, gradient="reversible", coupling=coupling)(x)  # noqa: E731
        errors = [relative(solve(n), exact) for n in counts]
    assert min(errors) > 1e-12
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    # y steps by Δ and z by −Δ, so that for an odd order their errors, ∓Δ^(p+1), are opposite: as the coupling draws y
    # to z, more with each step, they cancel, and the slope rises towards p + 1.
    above = 1.0 if tableau.order % 2 == 1 and coupling < 1.0 else 0.0
    assert tableau.order - 0.2 <= slope <= tableau.order + above + 0.2


@pytest.mark.parametrize("settings", [{"steps": 4}, {"solver": "dopri5"}])
def test_the_scheme_is_the_same_with_and_without_gradients_and_in_evaluation(settings):
    block, x = ODEBlock(Field(), gradient="reversible", **settings), randn(3, 4)
    out = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), out)
    assert torch.equal(block.eval()(x), out)
    assert not torch.equal(ODEBlock(block.branch, **settings)(x), out), "it is another scheme than the plain one"


# --- its gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 16, 256])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_gradient_is_exact_however_many_steps_are_undone(steps, dtype, allowed):
    field, x = Field().to(dtype), randn(3, 4).to(dtype)
    block = ODEBlock(field, "rk4", steps, gradient="reversible")
    plain = ODEBlock(field, "rk4", steps)
    expected = gradients(lambda x: reversible_by_autograd(plain, x), field, x)
    assert difference(gradients(block, field, x), expected) < allowed


@pytest.mark.parametrize("settings", [{"steps": 64}, {"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}])
def test_the_backward_pass_comes_back_to_the_input(settings):
    block, x = ODEBlock(Field(), **settings), randn(3, 4).requires_grad_()
    mode, f = Reversible(), Solve(block.branch, SolveContext(detached=True))
    (out,) = integrate(f, block.scheme(), (x,), mode, list(block.parameters()))
    out.sum().backward()
    assert relative(mode.start, x) < 1e-12


def test_the_steps_that_an_adaptive_solve_accepts_are_the_schemes_own():
    settings = {"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6, "t1": 4.0}
    block, x = ODEBlock(Field(), gradient="reversible", **settings), randn(3, 4)
    mode = Reversible()
    integrate(Solve(block.branch, SolveContext(t1=4.0)), block.scheme(), (x,), mode, list(block.parameters()))
    found = block.accepted_grid(x)
    assert found == (0.0, *(end for _, end in mode.steps))
    assert found != ODEBlock(block.branch, **settings).accepted_grid(x)


@pytest.mark.parametrize("solver", TABLEAUX)
def test_each_step_evaluates_f_twice_as_often_and_so_does_its_undoing(solver):
    block = ODEBlock(Field(), solver, steps=5, gradient="reversible")
    block(randn(3, 4).requires_grad_()).sum().backward()
    assert block.stats.nfe_forward == block.stats.nfe_backward == 5 * 2 * TABLEAUX[solver].solution_stages


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_steps_that_were_rejected_are_not_undone(solver):
    class Bump(Field):
        def forward(self, t, h):
            return super().forward(t, h) * (1.0 + 20.0 * math.exp(-(((t - 0.6) / 0.1) ** 2)))

    block = ODEBlock(Bump(), solver, gradient="reversible", rtol=1e-4, atol=1e-4, coupling=0.999)
    block(randn(3, 4).requires_grad_()).sum().backward()
    assert block.stats.rejected > 0
    assert block.stats.nfe_backward == block.stats.accepted * 2 * TABLEAUX[solver].solution_stages


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_of_half_precision_is_integrated_and_undone_in_single(dtype):
    """512 increments of 1/512: in half precision 1 + 1/512 would be 1 in bfloat16, and the sum of gradients 1/2."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, dtype=dtype))
            self.given = set()

        def forward(self, t, h):
            self.given.add(h.dtype)
            return self.w.expand_as(h)

    block = ODEBlock(Constant(), "euler", steps=512, gradient="reversible", coupling=1.0)
    x = torch.ones(1, 4, dtype=dtype, requires_grad=True)
    out = block(x)
    out.sum().backward()
    assert block.branch.given == {dtype}, "the branch computes in the type it was given"
    torch.testing.assert_close(out, torch.full_like(x, 2.0))
    torch.testing.assert_close(block.branch.w.grad, torch.ones_like(block.branch.w))
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_many_steps_of_a_small_coupling_warn_of_the_rounding_they_multiply():
    """λ^(−N) > 100: at λ = 0.99 from 459 steps on. Nothing is undone where no gradient is asked for."""
    x = randn(3, 4)

    def solve(steps, coupling):
        return ODEBlock(Field(), "euler", steps, gradient="reversible", coupling=coupling)(x).sum()

    with pytest.warns(UserWarning, match=r"459 steps and coupling 0\.99.*nearer 1"):
        solve(459, 0.99).backward()
    with pytest.warns(UserWarning, match=r"rounding by up to 1\.02e\+03"):
        solve(10, 0.5).backward()
    with pytest.warns(UserWarning, match=r"400 steps and coupling 0\.1: .* rounding by up to inf"):
        solve(400, 0.1).backward()  # 10^400 is no float
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(458, 0.99).backward()
        solve(2000, 1.0).backward()
        solve(459, 0.99)


def test_rounding_grows_as_the_warning_says():
    """The start that is come back to is off by no more than λ^(−N) roundings, and by many of them."""
    x, errors = randn(3, 4).requires_grad_(), []
    for coupling in (1.0, 0.7):
        block = ODEBlock(Field(), "euler", steps=40)
        mode, f = Reversible(coupling), Solve(block.branch, SolveContext(detached=True))
        (out,) = integrate(f, block.scheme(), (x,), mode, list(block.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out.sum().backward()
        errors.append(relative(mode.start, x))
    grown = 0.7**-40
    assert errors[0] < 1e-14
    assert 1e-3 * grown * 1e-16 < errors[1] < 10.0 * grown * 1e-16
