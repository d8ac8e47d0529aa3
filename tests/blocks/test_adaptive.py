"""Solvers with an error control: against torchdiffeq and closed forms, and what they never do."""

import math
import re

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from resode.blocks.adaptive import ADAPTIVE, Adaptive
from resode.blocks.ode import ODEBlock
from resode.errors import SolverError
from resode.layers.context import interval_time

STAGES = {"dopri5": 6, "bosh3": 3, "dopri8": 13, "adaptive_heun": 1}
"""Evaluations that each step adds: the first is the last of the step before."""


class Function(nn.Module):
    """A field given by a function of (t, h), which notes the times it is asked at."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function, self.times = function, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        assert isinstance(t, float), "a fixed type: nothing to synchronize on a GPU"
        self.times.append(t)
        return self.function(t, h)


def block(function, solver="dopri5", tol=1e-6, **settings):
    attributes = {name: settings.pop(name) for name in ("breakpoints",) if name in settings}
    return ODEBlock(Function(function, **attributes), solver, rtol=tol, atol=tol, **settings)


def state(*shape, seed=0):
    return torch.randn(*(shape or (3, 4)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MATRIX = state(4, 4, seed=1)


def smooth(t, h):
    return torch.tanh(h @ MATRIX) * (1.0 + math.sin(5.0 * t))


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_linear_field_gives_the_exponential_at_the_tolerance(solver, tol):
    out = block(lambda t, h: h @ MATRIX, solver, tol, t0=-0.5, t1=1.0)(state())
    exact = state() @ torch.linalg.matrix_exp(1.5 * MATRIX)
    assert (out - exact).abs().max() < 100 * tol * exact.abs().max()


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_tighter_tolerance_costs_more_and_errs_less(solver):
    exact = state() @ torch.linalg.matrix_exp(MATRIX)
    errors, costs = [], []
    for tol in (1e-5, 1e-7, 1e-9) if solver == "dopri8" else (1e-2, 1e-4, 1e-5):
        b = block(lambda t, h: h @ MATRIX, solver, tol)
        errors.append((b(state()) - exact).abs().max().item())
        costs.append(b.stats.nfe_forward)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_rtol_and_atol_each_control(solver):
    """On a large state atol does nothing and rtol all; on a small one the other way round."""

    def cost(size, rtol, atol):
        b = ODEBlock(Function(smooth_scaled(size)), solver, rtol=rtol, atol=atol)
        b(size * state())
        return b.stats.nfe_forward

    def smooth_scaled(size):
        return lambda t, h: size * smooth(t, h / size)

    loose, tight = 1e-2, 1e-6
    assert cost(1e4, tight, loose) > cost(1e4, loose, loose)
    assert cost(1e-3, loose, 1e-9) > cost(1e-3, loose, 1e-5)


TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def torchdiffeqs(solver, tol, **options):
    """torchdiffeq's own solution of the smooth field, and how often it evaluated it."""
    count = 0

    def field(t, h):
        nonlocal count
        count += 1
        return smooth(float(t), h)

    return odeint(field, state(), TIMES, rtol=tol, atol=tol, method=solver, options=options)[-1], count


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_solution_is_torchdiffeqs(solver, tol):
    """The same steps when torchdiffeq lands on the end, too; and near its solution at a much tighter tolerance."""
    b = block(smooth, solver, tol)
    out = b(state())
    theirs, count = torchdiffeqs(solver, tol, step_t=TIMES[1:])
    torch.testing.assert_close(out, theirs, rtol=1e-12, atol=1e-12)
    assert b.stats.nfe_forward == count
    assert (out - torchdiffeqs("dopri5", 1e-10)[0]).abs().max() < 100 * tol


def test_landing_on_the_end_spares_the_error_of_interpolating_to_it():
    """torchdiffeq interpolates a step of dopri8 by a polynomial of degree 4: 3e-5 at a tolerance of 1e-7."""
    exact = torchdiffeqs("dopri5", 1e-10)[0]
    ours = (block(smooth, "dopri8", 1e-7)(state()) - exact).abs().max()
    theirs = (torchdiffeqs("dopri8", 1e-7)[0] - exact).abs().max()
    assert ours < 1e-6 < 1e-5 < theirs


@pytest.mark.parametrize(("higher", "lower", "tol"), [("dopri8", "dopri5", 1e-11), ("dopri5", "bosh3", 1e-6)])
def test_a_solver_of_higher_order_needs_fewer_evaluations_at_a_tight_tolerance(higher, lower, tol):
    costs = []
    for solver in (higher, lower):
        b = block(smooth, solver, tol)
        b(state())
        costs.append(b.stats.nfe_forward)
    assert costs[0] < costs[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_state_of_half_precision_is_integrated_in_single(solver, dtype):
    """torchdiffeq keeps the time in the state's type: 8 bits of it at bfloat16, and NaN at float16."""
    kinds = set()

    def field(t, h):
        kinds.add(h.dtype)
        return -(4.0 * h)

    b = block(field, solver, 1e-3)
    x = torch.linspace(0.5, 2.0, 12).view(3, 4).to(dtype)
    out = b(x)
    assert out.dtype == dtype
    assert kinds == {dtype}, "the branch computes in the type it was given"
    torch.testing.assert_close(out.float(), math.exp(-4.0) * x.float(), rtol=0.03, atol=0.003)


# --- where f is evaluated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.7, 1.1), (-0.3, 0.1)])
@pytest.mark.parametrize("slow", [1.0, 1e-3])
def test_f_is_never_evaluated_outside_the_interval(t0, t1, slow, solver, gradient):
    """A slow field of a large state tempts the choice of the first step to look ten units beyond the end."""
    for dtype in (torch.float32, torch.float64):
        b = block(lambda t, h: slow * torch.tanh(h), solver, 1e-3, t0=t0, t1=t1, gradient=gradient)
        x = (100.0 * state()).to(dtype).requires_grad_()
        b(x).sum().backward()
        times = b.branch.times
        assert min(times) >= t0
        assert max(times) <= t1
        # and the whole interval is covered (torchdiffeq shifts the last stage by a rounding)
        assert min(times) == pytest.approx(t0, abs=1e-6)
        assert max(times) == pytest.approx(t1, abs=1e-6)


def test_a_field_that_is_singular_beyond_its_interval_can_be_integrated():
    """dh/dt = −h/(2(1 − t)) on [0, 0.99]: h = sqrt(1 − t), and f is NaN beyond 1."""
    b = block(lambda t, h: -h / (2.0 * math.sqrt(1.0 - t) ** 2), t1=0.99)
    out = b(torch.ones(1, 1, dtype=torch.float64))
    assert out.item() == pytest.approx(math.sqrt(0.01), abs=1e-4)


# --- counts ----------------------------------------------------------------------------------------------------------


def bumpy(t, h):
    return -h * (1.0 + 60.0 * math.exp(-(((t - 0.6) / 0.1) ** 2)))


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_counts_are_exact(solver, pieces):
    points = (0.25, 0.5)[: pieces - 1]
    b = block(bumpy, solver, 1e-5, breakpoints=points)
    b(state())
    stats = b.stats
    tried = stats.accepted + stats.rejected
    assert stats.rejected > 0
    assert stats.nfe_forward == len(b.branch.times) == 2 * pieces + STAGES[solver] * tried
    assert stats.nfe_backward == 0


def test_the_adjoints_evaluations_are_counted_apart():
    b = block(smooth, gradient="adjoint")
    out = b(state().requires_grad_())
    forward = b.stats.nfe_forward
    assert (len(b.branch.times), b.stats.nfe_backward) == (forward, 0)
    accepted = b.stats.accepted
    out.sum().backward()
    assert b.stats.nfe_backward == len(b.branch.times) - forward > 0
    assert (b.stats.nfe_forward, b.stats.accepted) == (forward, accepted)


# --- breakpoints -----------------------------------------------------------------------------------------------------


def jumping(t, h):
    """Constant on pieces, chosen by the solver's piece: h(1) = h(0)·exp(0.3·40 − 0.2·30 − 0.5·20)."""
    rate = next(r for end, r in ((0.3, 40.0), (0.5, -30.0), (1.0, -20.0)) if interval_time(t) < end)
    return rate * h


@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
def test_breakpoints_are_landed_on(solver):
    b = block(jumping, solver, 1e-8, breakpoints=(0.3, 0.5))
    exact = math.exp(12.0 - 6.0 - 10.0)
    assert b(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-5)
    for point in (0.3, 0.5):
        assert any(abs(t - point) < 1e-12 for t in b.branch.times)
    without = block(jumping_by_time, solver, 1e-8)  # no breakpoints: the jumps are inside steps
    without(torch.ones(1, 1, dtype=torch.float64))
    assert without.stats.rejected > b.stats.rejected, "a jump inside a step must be hunted down"


def jumping_by_time(t, h):
    return next(r for end, r in ((0.3, 40.0), (0.5, -30.0), (2.0, -20.0)) if t < end) * h


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((), (0.0, 1.0)),
        ((0.5, 0.25), (0.0, 0.25, 0.5, 1.0)),
        ((-1.0, 0.0, 0.5, 1.0, 7.0), (0.0, 0.5, 1.0)),
        ((0.3, 0.1 + 0.2, 0.3 + 1e-12), (0.0, 0.3, 1.0)),
        ((1e-15, 1.0 - 1e-15), (0.0, 1.0)),
    ],
)
def test_pieces_are_cut_at_the_breakpoints_inside_and_at_none_twice(points, expected):
    assert Adaptive("dopri5", 0.0, 1.0, 1e-3, 1e-3, points).pieces() == pytest.approx(expected, abs=1e-11)


def test_mask_intervals_are_landed_on_in_training():
    b = block(smooth, mask_intervals=4)
    b(state())
    assert all(any(abs(t - point) < 1e-12 for t in b.branch.times) for point in (0.25, 0.5, 0.75))
    b.branch.times.clear()
    b.eval()(state())
    assert not any(abs(t - 0.25) < 1e-12 for t in b.branch.times)


# --- what cannot be integrated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8"])
def test_a_solution_that_blows_up_is_an_error_that_says_where(solver):
    b = block(lambda t, h: h * h, solver, 1e-4, t1=2.0)
    with pytest.raises(SolverError) as caught:
        b(torch.ones(2, 2, dtype=torch.float64))
    message = str(caught.value)
    assert message.startswith(f"{solver} cannot go on at t = ")
    assert float(re.search(r"at t = ([\d.e+-]+)", message).group(1)) == pytest.approx(1.0, abs=0.01)
    for said in ("from 0 to 2", "rtol = 0.0001", "atol = 0.0001", "‖f‖ = ", "rk4", "smaller weights"):
        assert said in message
    assert float(re.search(r"‖f‖ = (\S+?)\)", message).group(1)) > 1e6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_field_that_is_not_finite_is_an_error(solver, value):
    b = block(lambda t, h: value * h, solver)
    with pytest.raises(SolverError, match=r"at t = 0 .*not finite"):
        b(torch.ones(2, 2))
    assert all(0.0 <= t <= 1.0 for t in b.branch.times)


def test_a_field_that_becomes_nan_on_the_way_is_an_error_there():
    b = block(lambda t, h: -h if t < 0.5 else h * math.nan)
    with pytest.raises(SolverError) as caught:
        b(torch.ones(2, 2, dtype=torch.float64))
    assert 0.5 <= float(re.search(r"at t = ([\d.e+-]+)", str(caught.value)).group(1)) < 1.0


def test_a_state_that_is_not_finite_is_an_error():
    with pytest.raises(SolverError):
        block(smooth)(state() * math.nan)


def test_too_many_steps_are_an_error(monkeypatch):
    monkeypatch.setattr("resode.blocks.adaptive.MAX_STEPS", 3)
    with pytest.raises(SolverError, match=r"max_num_steps exceeded \(3>=3\)"):
        block(bumpy, tol=1e-9)(state())


def test_an_adjoint_that_cannot_go_on_is_an_error_too():
    """The forward solve decays to nothing; the way back grows without bound."""
    b = block(lambda t, h: -(h**3) * (1e6 if len(b.branch.times) > forward else 1.0), tol=1e-3, gradient="adjoint")
    forward = math.inf
    out = b(torch.full((1, 1), 3.0, dtype=torch.float64, requires_grad=True))
    forward = len(b.branch.times)
    with pytest.raises(SolverError, match="from 1 to 0"):
        out.sum().backward()


def test_an_assertion_of_the_branch_is_the_branchs_own():
    def fails(t, h):
        assert t < 0.5, "the user's own assertion"
        return -h

    with pytest.raises(AssertionError, match="the user's own assertion"):
        block(fails)(state())
