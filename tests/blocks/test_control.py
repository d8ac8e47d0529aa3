"""Solvers with an error control: against torchdiffeq and closed forms, what a step costs, and what they never do."""

import math
import re
from itertools import pairwise

import pytest
import torch
from fields import Function
from operations import SYNCS, Operations
from torch import nn
from torchdiffeq import odeint

from resode.blocks.control import Adaptive
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.tableaux import ADAPTIVE, TABLEAUX
from resode.errors import SolverError
from resode.layers.context import interval_time
from resode.layers.norm import BatchNorm


def block(function, solver="dopri5", tol=1e-6, **settings):
    attributes = {name: settings.pop(name) for name in ("breakpoints",) if name in settings}
    return ODEBlock(Function(function, **attributes), solver, rtol=tol, atol=tol, **settings)


def state(*shape, seed=0):
    return torch.randn(*(shape or (3, 4)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MATRIX = state(4, 4, seed=1)


def smooth(t, h):
    return torch.tanh(h @ MATRIX) * (1.0 + math.sin(5.0 * t))


def bumpy(t, h):
    return -h * (1.0 + 60.0 * math.exp(-(((t - 0.6) / 0.1) ** 2)))


def attempts(times, solver):
    """The ends of the steps that were tried, and whether each was accepted, from the times of the evaluations.

    Of a solve by a first-same-as-last pair without breakpoints: f(t0), one evaluation for the size of the first step,
    and each attempt's stages, of which the last is at its end. After a rejected step the next is a part of it.
    """
    stages = TABLEAUX[solver].stages - 1
    groups = [times[i : i + stages] for i in range(2, len(times), stages)]
    ends = [group[-1] for group in groups]
    taken = [following[0] >= end for end, following in zip(ends, groups[1:], strict=False)]
    return groups, [*taken, True]


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
    for tol in (1e-5, 1e-7, 1e-9) if TABLEAUX[solver].order >= 5 else (1e-2, 1e-4, 1e-5):
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

    tight = 1e-6 if solver == "adaptive_heun" else 1e-9
    assert cost(1e4, tight, 1e-2) > cost(1e4, 1e-3, 1e-2)
    assert cost(1e4, 1e-3, 1e-2) == pytest.approx(cost(1e4, 1e-3, tight), rel=0.1)
    assert cost(1e-3, tight, 1e-3 * tight) > cost(1e-3, tight, 1e-5)
    assert cost(1e-3, tight, 1e-5) == pytest.approx(cost(1e-3, 1e-3 * tight, 1e-5), rel=0.1)


TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def torchdiffeqs(solver, tol, field=smooth, **options):
    return odeint(lambda t, h: field(float(t), h), state(), TIMES, rtol=tol, atol=tol, method=solver, options=options)[
        -1
    ]


@pytest.mark.parametrize("field", [smooth, bumpy])
@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
def test_the_solution_at_a_tight_tolerance_is_torchdiffeqs(solver, field):
    """Their steps differ (each has a controller of its own), the limit does not.

    torchdiffeq is made to land on the end.
    """
    theirs = torchdiffeqs(solver, 1e-10, field, step_t=TIMES[1:])
    torch.testing.assert_close(block(field, solver, 1e-10)(state()), theirs, rtol=1e-8, atol=1e-8)


def test_landing_on_the_end_spares_the_error_of_interpolating_to_it():
    """torchdiffeq interpolates a step of dopri8 by a polynomial of degree 4: 3e-5 at a tolerance of 1e-7."""
    exact = torchdiffeqs("dopri5", 1e-10)
    ours = (block(smooth, "dopri8", 1e-7)(state()) - exact).abs().max()
    theirs = (torchdiffeqs("dopri8", 1e-7) - exact).abs().max()
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


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.7, 1.1), (-0.3, 0.1)])
@pytest.mark.parametrize("slow", [1.0, 1e-3])
def test_f_is_never_evaluated_outside_the_interval(t0, t1, slow, solver, gradient):
    """A slow field of a large state tempts the choice of the first step to look ten units beyond the end."""
    for dtype in (torch.float32, torch.float64):
        b = block(lambda t, h: slow * torch.tanh(h), solver, 1e-3, t0=t0, t1=t1, gradient=gradient)
        x = (100.0 * state()).to(dtype).requires_grad_()
        b(x).sum().backward()
        b.inverse(x)
        times = b.branch.times
        assert (min(times), max(times)) == (t0, t1)


def test_a_field_that_is_singular_beyond_its_interval_can_be_integrated():
    """dh/dt = −h/(2(1 − t)) on [0, 0.99]: h = sqrt(1 − t), and f is NaN beyond 1."""
    b = block(lambda t, h: -h / (2.0 * math.sqrt(1.0 - t) ** 2), t1=0.99)
    out = b(torch.ones(1, 1, dtype=torch.float64))
    assert out.item() == pytest.approx(math.sqrt(0.01), abs=1e-4)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_solve_runs_in_both_directions(solver):
    b, x = block(smooth, solver, 1e-5 if solver in ("adaptive_heun", "bosh3") else 1e-9), state()
    torch.testing.assert_close(b.inverse(b(x)), x, rtol=0, atol=1e-3 if solver in ("adaptive_heun", "bosh3") else 1e-7)


# --- breakpoints -----------------------------------------------------------------------------------------------------


def jumping(t, h):
    """Constant on pieces, chosen by the solver's piece: h(1) = h(0)·exp(0.3·40 − 0.2·30 − 0.5·20)."""
    rate = next(r for end, r in ((0.3, 40.0), (0.5, -30.0), (1.0, -20.0)) if interval_time(t) < end)
    return rate * h


def jumping_by_time(t, h):
    return next(r for end, r in ((0.3, 40.0), (0.5, -30.0), (2.0, -20.0)) if t < end) * h


@pytest.mark.parametrize("solver", ["tsit5", "dopri5", "dopri8"])
def test_breakpoints_are_landed_on(solver):
    b = block(jumping, solver, 1e-8, breakpoints=(0.3, 0.5))
    exact = math.exp(12.0 - 6.0 - 10.0)
    assert b(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-5)
    assert {0.3, 0.5} <= set(b.branch.times)
    without = block(jumping_by_time, solver, 1e-8)  # no breakpoints: the jumps are inside steps
    without(torch.ones(1, 1, dtype=torch.float64))
    assert without.stats.rejected > b.stats.rejected, "a jump inside a step must be hunted down"


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_stages_of_a_step_use_the_steps_own_piece(solver, gradient, direction):
    """At a breakpoint f is evaluated on both sides: the last stage before it is not the first stage after it."""
    met = []

    def field(t, h):
        met.append((t, interval_time(t)))
        return -h * (1.0 + t)

    b = block(field, solver, 1e-4, breakpoints=(0.25, 0.5), gradient=gradient)
    if direction > 0:
        b(state().requires_grad_()).sum().backward()
    else:
        b.inverse(state())
    ends = (0.0, 0.25, 0.5, 1.0)
    seen = set()
    for t, inside in met:
        piece = next((a, b) for a, b in pairwise(ends) if a < inside < b)
        assert piece[0] <= t <= piece[1]
        seen.add((t, piece))
    assert (0.25, (0.25, 0.5)) in seen if direction > 0 else (0.25, (0.0, 0.25)) in seen
    if TABLEAUX[solver].c[-1] == 1.0:
        assert {(0.25, (0.0, 0.25)), (0.25, (0.25, 0.5)), (0.5, (0.25, 0.5)), (0.5, (0.5, 1.0))} <= seen


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
    scheme = Adaptive(TABLEAUX["dopri5"], 0.0, 1.0, breakpoints=points)
    assert scheme.pieces() == pytest.approx(expected, abs=1e-11)
    assert scheme.reversed().pieces() == pytest.approx(expected[::-1], abs=1e-11)


def test_mask_intervals_are_landed_on_in_training():
    b = block(smooth, mask_intervals=4)
    b(state())
    assert {0.25, 0.5, 0.75} <= set(b.branch.times)
    b.branch.times.clear()
    b.eval()(state())
    assert 0.25 not in b.branch.times


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_counts_are_exact(solver, pieces, gradient):
    """One evaluation for the size of the first step; a first-same-as-last pair starts each step of a piece but the
    first with the last evaluation of the step before, and the others evaluate f at the start of each accepted step."""
    points = (0.25, 0.5)[: pieces - 1]
    b = block(bumpy, solver, 1e-5, breakpoints=points, gradient=gradient)
    b(state().requires_grad_())
    stats, tableau = b.stats, TABLEAUX[solver]
    tried = stats.accepted + stats.rejected
    assert stats.rejected > 0
    starts = pieces if tableau.fsal else stats.accepted
    assert stats.nfe_forward == len(b.branch.times) == 1 + starts + (tableau.stages - 1) * tried
    assert stats.nfe_backward == 0


def test_dopri5_costs_six_evaluations_a_step_that_is_tried_and_two_more():
    b = block(bumpy, "dopri5", 1e-5)
    b(state())
    assert b.stats.nfe_forward == 2 + 6 * (b.stats.accepted + b.stats.rejected)


@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5"])
def test_the_steps_counted_are_those_that_were_made(solver):
    b = block(bumpy, solver, 1e-5)
    b(state())
    groups, taken = attempts(b.branch.times, solver)
    assert (b.stats.accepted, b.stats.rejected) == (sum(taken), len(groups) - sum(taken))
    assert b.stats.rejected > 0


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible", "adjoint"])
def test_the_evaluations_of_the_backward_pass_are_counted_apart(gradient):
    b = block(bumpy, gradient=gradient)
    out = b(state().requires_grad_())
    forward, accepted, rejected = b.stats.nfe_forward, b.stats.accepted, b.stats.rejected
    assert (len(b.branch.times), b.stats.nfe_backward) == (forward, 0)
    out.sum().backward()
    assert b.stats.nfe_backward == len(b.branch.times) - forward > 0
    assert (b.stats.nfe_forward, b.stats.accepted, b.stats.rejected) == (forward, accepted, rejected)
    if gradient != "adjoint":  # each accepted step once again, without the stage for its error (in two halves)
        assert b.stats.nfe_backward == 6 * accepted * (2 if gradient == "reversible" else 1)


# --- the control -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_first_attempt_has_the_size_that_is_asked_for(solver, first):
    b = block(smooth, solver, first_step=first)
    b(state())
    tableau = TABLEAUX[solver]
    assert b.branch.times[: tableau.stages] == pytest.approx([first * c for c in tableau.c], abs=1e-15)


def test_a_first_step_beyond_the_end_is_a_step_to_the_end():
    b = block(lambda t, h: 1e-3 * h, first_step=7.0)
    b(state())
    assert (b.stats.accepted, b.stats.rejected, b.stats.nfe_forward) == (1, 0, 1 + 6)


@pytest.mark.parametrize("breakpoints", [(), (0.3,)])
def test_a_smallest_step_that_suffices_is_no_hindrance(breakpoints):
    """Steps that are cut to land on an end may be smaller, and so would be the first that is chosen from f."""
    for least in (0.02, 0.1, 0.27, 0.4, 0.9):
        b = block(lambda t, h: -h, tol=1e-2, min_step=least, breakpoints=breakpoints)
        for x in (torch.ones(2, 2), torch.zeros(2, 2)):
            torch.testing.assert_close(b(x), math.exp(-1.0) * x, rtol=0.02, atol=0.02)
            assert b.stats.accepted <= math.ceil(1.0 / least) + len(breakpoints)


def test_a_step_that_is_cut_to_land_on_a_breakpoint_leaves_the_size_there_was():
    b = block(lambda t, h: 1e-3 * h, first_step=0.3, breakpoints=(0.001,))
    b(state())
    # To the breakpoint, 0.3 from there, and the rest, which is ten times that at most.
    assert b.stats.accepted <= 3
    assert any(t == pytest.approx(0.301) for t in b.branch.times)


def test_a_step_below_the_smallest_is_an_error_that_says_so():
    with pytest.raises(
        SolverError, match=r"fell below min_step = 0\.01 \(step size 0\.00\d+, ‖f‖ = .*, \d+ steps tried"
    ):
        block(bumpy, tol=1e-9, min_step=0.01)(state())


@pytest.mark.parametrize("breakpoints", [(), (0.25, 0.5)])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_max_steps_are_the_attempts_that_are_allowed(solver, breakpoints):
    b = block(bumpy, solver, 1e-4, breakpoints=breakpoints)
    expected = b(state())
    tried = b.stats.accepted + b.stats.rejected
    b.max_steps = tried
    assert torch.equal(b(state()), expected)
    for fewer in (tried - 1, 3, 1):
        b.max_steps = fewer
        b.branch.times.clear()
        with pytest.raises(SolverError, match=rf"max_steps = {fewer} were not enough .*{fewer} steps tried"):
            b(state())
        assert b.stats.accepted + b.stats.rejected == fewer


def test_max_steps_hold_for_pieces_of_one_step_each():
    b = block(lambda t, h: -1e-3 * h, breakpoints=tuple(i / 16 for i in range(1, 16)), max_steps=5)
    with pytest.raises(SolverError, match="max_steps = 5"):
        b(state())
    assert b.stats.accepted == 5


def stiff(t, h):
    """The last element of a sample is its rate."""
    return torch.cat([-h[:, -1:] * torch.sin(h[:, -1:] * t) * h[:, :-1], torch.zeros_like(h[:, -1:])], 1)


def rates(*values):
    """Samples of those rates; h(1) = exp(cos(rate) − 1)."""
    return torch.tensor([[1.0, 1.0, rate] for rate in values], dtype=torch.float64)


def exact(x):
    return torch.cat([torch.exp(torch.cos(x[:, -1:]) - 1.0) * x[:, :-1], x[:, -1:]], 1)


@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5", "dopri8"])
def test_with_the_norm_of_a_sample_each_sample_keeps_the_tolerance(solver):
    """One fast sample among 255 slow ones: a mean hides its error, by a factor of up to 16; the largest does not."""
    x, tol = rates(40.0, *[0.0] * 255), 1e-4
    errors, costs = {}, {}
    for norm in ("sample", "batch"):
        b = block(stiff, solver, tol, error_norm=norm)
        errors[norm] = (b(x) - exact(x)).abs().amax(1)
        costs[norm] = b.stats.nfe_forward
    alone = block(stiff, solver, tol)
    alone_error = (alone(x[:1]) - exact(x[:1])).abs().max()
    assert errors["sample"].max() < 2 * alone_error
    assert errors["batch"].max() > 3 * errors["sample"].max()
    assert costs["batch"] < 0.9 * costs["sample"]


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_copies_of_a_sample_take_the_steps_of_one(solver, norm):
    x, tol = rates(20.0), 1e-2 if solver == "adaptive_heun" else 1e-4
    one, many = (block(stiff, solver, tol, error_norm=norm) for _ in range(2))
    out = one(x)
    torch.testing.assert_close(many(x.expand(5, -1)), out.expand(5, -1), rtol=1e-12, atol=1e-12)
    assert many.branch.times == pytest.approx(one.branch.times, abs=1e-12)


def test_easier_companions_change_a_sample_in_the_norm_of_the_batch_alone():
    for norm, same in (("sample", True), ("batch", False)):
        alone, together = (block(stiff, tol=1e-4, error_norm=norm) for _ in range(2))
        out = alone(rates(20.0))
        found = together(rates(20.0, 0.0, 0.0, 0.0))[:1]
        assert (together.branch.times == alone.branch.times) is same
        assert torch.equal(found, out) is same


def test_a_state_of_one_dimension_has_no_samples_to_tell_apart():
    times = []
    for norm in ("sample", "batch"):
        b = block(lambda t, h: torch.tensor([-40.0, -1.0], dtype=torch.float64) * h, tol=1e-5, error_norm=norm)
        b(torch.ones(2, dtype=torch.float64))
        times.append(b.branch.times)
    assert times[0] == times[1]


# --- what is no part of the graph ------------------------------------------------------------------------------------


class Mark(torch.autograd.Function):
    """The identity, one node of the graph for each evaluation that is in it."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def evaluations_within(out):
    seen, to_see = set(), [out.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is not None and node not in seen:
            seen.add(node)
            to_see += [following for following, _ in node.next_functions]
    return sum(node.name() == "MarkBackward" for node in seen)


@pytest.mark.parametrize("breakpoints", [(), (0.25, 0.5)])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_graph_holds_the_stages_of_accepted_steps_and_nothing_else(solver, breakpoints):
    """Not the rejected steps, not the evaluation for the first step's size, nor stages for an error estimate alone (as
    the last one of a first-same-as-last pair is where no step follows in the same piece)."""
    b = block(lambda t, h: bumpy(t, Mark.apply(h)), solver, 1e-4, breakpoints=breakpoints)
    out = b(state().requires_grad_())
    assert b.stats.rejected > 0
    assert evaluations_within(out) == TABLEAUX[solver].solution_stages * b.stats.accepted < b.stats.nfe_forward


@pytest.mark.parametrize("breakpoints", [(), (0.25, 0.5)])
@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5"])
def test_stages_for_the_error_estimate_alone_are_evaluated_without_gradients(solver, breakpoints):
    """Those at the ends of the pieces, where no step follows, and the evaluation for the first step's size."""
    met = []

    def field(t, h):
        met.append((t, interval_time(t), torch.is_grad_enabled()))
        return bumpy(t, h)

    b = block(field, solver, 1e-4, breakpoints=breakpoints)
    b(state().requires_grad_())
    assert not met[1][2]
    assert met[0][2]
    for end in (*breakpoints, 1.0):
        at_end = [grad for t, inside, grad in met if t == end and inside < end]
        # A stage before the last may stand at the end, too (c = 1), and is part of the solution.
        assert at_end[-1] is False
        assert at_end.count(True) == sum(c == 1.0 for c in TABLEAUX[solver].c[:-1]) * at_end.count(False)


def test_the_step_sizes_are_constants_to_the_gradient():
    """Scaling f and x scales the tolerances' meaning, but the gradient is that of the steps that were made."""
    b = block(smooth, "dopri5", 1e-3)
    x = state().requires_grad_()
    (found,) = torch.autograd.grad(b(x).sum(), x)
    # The same steps from a fixed grid, whose sizes are numbers.
    groups, taken = attempts(b.branch.times[: b.stats.nfe_forward], "dopri5")
    grid = [0.0, *(group[-1] for group, kept in zip(groups, taken, strict=True) if kept)]
    h = x
    for start, end in pairwise(grid):
        h = ODEBlock(Function(smooth), "dopri5", steps=1, t0=start, t1=end)(h)
    (expected,) = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- what a solve asks of the device ---------------------------------------------------------------------------------


class Elementwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(-4.0, dtype=torch.float64))

    def forward(self, t, h):
        return torch.tanh(self.rate * h) * (1.0 + t)


@pytest.mark.parametrize("norm", ["batch", "sample"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5", "dopri8"])
def test_the_host_waits_once_a_step_and_three_times_at_the_start(solver, gradient, norm):
    b = ODEBlock(Elementwise(), solver, rtol=1e-4, atol=1e-4, gradient=gradient, error_norm=norm)
    with Operations() as forward:
        out = b(state().requires_grad_())
    tried = b.stats.accepted + b.stats.rejected
    assert tried > 3
    assert forward.count("tanh") == b.stats.nfe_forward
    assert forward.count(*SYNCS) <= tried + 3
    with Operations() as backward:
        out.sum().backward()
    assert backward.count(*SYNCS) == 0 or gradient == "adjoint"
    if gradient == "adjoint" and TABLEAUX[solver].fsal:  # a solve of its own, and a look at the cotangent
        tried = (b.stats.nfe_backward - 2) / (TABLEAUX[solver].stages - 1)
        assert backward.count(*SYNCS) <= tried + 3 + 1


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_stages_are_summed_without_a_stacked_tensor(solver):
    b, x = ODEBlock(Elementwise(), solver, rtol=1e-3, atol=1e-3), state(5, 7).requires_grad_()
    with Operations() as seen:
        b(x).sum().backward()
    assert b.stats.accepted > 1
    assert seen.count("stack", "cat", "_stack", "_cat") == 0
    assert seen.largest == x.numel()


# --- batch statistics ------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A field with a batch norm, which notes the moments that its norm meets."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNorm(3).double()
        self.times, self.met = [], []

    def forward(self, t, h):
        self.times.append(t)
        self.met.append((h.mean(0).detach(), h.var(0).detach()))
        return -(1.0 + 60.0 * math.exp(-(((t - 0.6) / 0.1) ** 2))) * h + 0.1 * self.norm(h)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5"])
def test_statistics_are_updated_once_a_solve_from_the_accepted_steps_alone(solver, gradient):
    b = ODEBlock(Normed(), solver, rtol=1e-4, atol=1e-4, knots=1, gradient=gradient)
    norm, x = b.branch.norm, 2.0 + state(8, 3)
    out = b(x.requires_grad_())
    assert b.stats.rejected > 0
    assert norm.num_batches_tracked.item() == 1
    groups, taken = attempts(b.branch.times, solver)
    stages = TABLEAUX[solver].stages - 1
    kept = [0, *(2 + i * stages + j for i in range(len(groups)) if taken[i] for j in range(stages))]
    mean, var = (torch.stack([b.branch.met[i][k] for i in kept]).mean(0) for k in (0, 1))
    torch.testing.assert_close(norm.running_mean.view(-1), 0.1 * mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_var.view(-1), 0.9 + 0.1 * var, rtol=1e-10, atol=1e-10)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    out.sum().backward()
    b.inverse(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    b(x)
    assert norm.num_batches_tracked.item() == 2


# --- what cannot be integrated ---------------------------------------------------------------------------------------


def said(message, what):
    """The number that ``message`` gives for ``what``."""
    return float(re.search(rf"{what} (?:= )?([-+.\de]+?)[ ,;)]", message).group(1))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_solution_that_blows_up_is_an_error_that_says_where(solver, gradient):
    b = block(lambda t, h: h * h, solver, 1e-2 if solver == "adaptive_heun" else 1e-4, t1=2.0, gradient=gradient)
    with pytest.raises(SolverError) as caught:
        b(torch.ones(2, 2, dtype=torch.float64))
    message = str(caught.value)
    assert message.startswith(f"{solver} cannot go on at t = ")
    assert said(message, "at t") == pytest.approx(1.0, abs=0.01)
    assert said(message, "step size") < 1e-6
    assert said(message, "‖f‖") > 1e6
    for advice in ("from 0 to 2", "looser tolerances", "rtol = 0.0", "atol = 0.0", "rk4", "smaller weights"):
        assert advice in message
    assert len(b.branch.times) < 30_000, "it gives up"


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_field_that_is_not_finite_at_the_start_is_an_error_at_once(solver, value, gradient):
    b = block(lambda t, h: value * h, solver, gradient=gradient)
    with pytest.raises(SolverError, match=r"at t = 0 .*not finite"):
        b(torch.ones(2, 2))
    assert b.branch.times == [0.0]
    with pytest.raises(SolverError, match=r"at t = 0 .*not finite"):
        ODEBlock(b.branch, solver, first_step=0.1)(torch.ones(2, 2))
    assert len(b.branch.times) <= 30


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_field_that_is_not_finite_from_some_time_on_is_an_error_there(solver, value):
    b = block(lambda t, h: -h if t < 0.5 else h * value, solver, 1e-3)
    with pytest.raises(SolverError) as caught:
        b(torch.ones(2, 2, dtype=torch.float64))
    assert said(str(caught.value), "at t") == pytest.approx(0.5, abs=1e-3)
    assert len(b.branch.times) < 2000


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_state_that_is_not_finite_is_an_error(solver, value, gradient):
    x = state()
    x[1, 2] = value
    for first in (None, 0.1):
        b = block(lambda t, h: torch.tanh(h), solver, gradient=gradient, first_step=first)
        with pytest.raises(SolverError, match=r"at t = 0 "):
            b(x)
        assert len(b.branch.times) < 1000


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_state_that_overflows_is_an_error_and_no_infinity(solver):
    """A constant field: every error estimate is 0 beside the infinite state."""
    b = block(lambda t, h: torch.full_like(h, 3e38), solver, t1=2.0)
    with pytest.raises(SolverError):
        b(torch.zeros(2, 2))


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
