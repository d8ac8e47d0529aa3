"""The context of a solve: inside one solve a branch is a function of (t, h) and of nothing else."""

import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.layers.context import SolveContext, current, evaluate, interval_time
from resode.layers.dropout import Dropout
from resode.layers.norm import BatchNorm, index_statistics


class MaskProbe(nn.Module):
    """dh/dt = w·m∘h·(1 + a bump in t), which notes (t, the masks it met); the bump makes adaptive solves reject."""

    def __init__(self, uses=1, bump=0.0, p=0.5):
        super().__init__()
        self.drop = Dropout(p)
        self.w = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))
        self.uses, self.bump = uses, bump
        self.seen = []

    def forward(self, t, h):
        masks = [self.drop(torch.ones_like(h)) for _ in range(self.uses)]
        self.seen.append((float(t), torch.stack(masks).detach()))
        wave = 1.0 + self.bump * torch.exp(-(((torch.as_tensor(t, dtype=h.dtype) - 0.6) / 0.1) ** 2))
        return self.w * sum(masks) * h * wave

    def masks(self):
        return [mask for _, mask in self.seen]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = BatchNorm(4)

    def forward(self, t, h):
        return self.norm(h)


def state(n=64, requires_grad=True):
    return torch.ones(2, n, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_one_mask_serves_every_evaluation_of_a_solve_and_the_next_solve_draws_anew(solver, gradient):
    torch.manual_seed(0)
    probe = MaskProbe(bump=60.0 if solver == "dopri5" else 0.0)
    block = ODEBlock(probe, solver, steps=None if solver == "dopri5" else 4, gradient=gradient)
    out = block(state())
    assert block.stats.rejected > 0 or solver != "dopri5"
    forward = len(probe.seen)
    out.sum().backward()
    assert (len(probe.seen) > forward) == (gradient == "adjoint")
    first = probe.seen[0][1]
    assert all(torch.equal(mask, first) for mask in probe.masks())
    probe.seen.clear()
    block(state())
    assert not torch.equal(probe.seen[0][1], first)


def test_masks_per_interval_change_at_the_intervals_and_the_stages_of_a_step_use_its_own():
    probe = MaskProbe()
    ODEBlock(probe, "rk4", steps=8, mask_intervals=4)(state())
    # Four stages a step, two steps an interval; the last stage of a step stands on the next one's start.
    masks = probe.masks()
    groups = [masks[i : i + 8] for i in range(0, 32, 8)]
    for group in groups:
        assert all(torch.equal(mask, group[0]) for mask in group)
    firsts = [group[0] for group in groups]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_masks_per_interval_are_a_function_of_time_in_the_adjoint_too(solver):
    probe = MaskProbe(bump=20.0)
    block = ODEBlock(
        probe, solver, steps=None if solver == "dopri5" else 6, gradient="adjoint", mask_intervals=3, t0=-1.0, t1=2.0
    )
    out = block(state())
    forward = len(probe.seen)
    out.sum().backward()
    assert len(probe.seen) > forward
    by_interval = {}
    for t, mask in probe.seen:
        if abs(t - round(t)) > 1e-6:  # strictly inside an interval (their ends are -1, 0, 1, 2)
            by_interval.setdefault(int(t + 1.0), []).append(mask)
    assert sorted(by_interval) == [0, 1, 2]
    for masks in by_interval.values():
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(by_interval[0][0], by_interval[1][0])
    assert not torch.equal(by_interval[1][0], by_interval[2][0])


def test_masks_per_interval_are_independent_of_the_solvers_grid():
    """The same draw order, so the same masks, on 3 and on 12 steps: the intervals decide, not the steps."""
    seen = []
    for steps in (3, 12):
        torch.manual_seed(0)
        probe = MaskProbe()
        ODEBlock(probe, "midpoint", steps=steps, mask_intervals=3)(state())
        unique = []
        for mask in probe.masks():
            if not any(torch.equal(mask, known) for known in unique):
                unique.append(mask)
        seen.append(torch.stack(unique))
    assert torch.equal(*seen)
    assert len(seen[0]) == 3


def test_two_uses_of_one_module_in_one_evaluation_have_masks_of_their_own():
    probe = MaskProbe(uses=2)
    ODEBlock(probe, "rk4", steps=2)(state())
    first, second = probe.seen[0][1]
    assert not torch.equal(first, second)
    assert all(torch.equal(mask, probe.seen[0][1]) for mask in probe.masks())


def test_the_gradient_belongs_to_its_own_forward_pass():
    """A second forward, with other masks, between a forward and its adjoint changes nothing."""

    def gradient(between):
        torch.manual_seed(3)
        probe, x = MaskProbe(), state()
        block = ODEBlock(probe, "rk4", steps=4, gradient="adjoint")
        out = block(x)
        between(block)
        out.square().sum().backward()
        return x.grad, probe.w.grad

    alone = gradient(lambda block: None)
    for between in (lambda block: block(state()), lambda block: block.eval(), lambda block: block.branch.drop.eval()):
        other = gradient(between)
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_an_evaluation_differentiated_in_training_mode_stays_an_evaluation():
    probe = MaskProbe()
    block = ODEBlock(probe.eval(), "rk4", steps=4, gradient="adjoint")
    out = block(state())
    block.train()
    out.sum().backward()
    assert torch.equal(torch.stack(probe.masks()), torch.ones(32, 1, 2, 64, dtype=torch.float64))


def test_a_residual_block_draws_at_every_call():
    torch.manual_seed(0)
    probe = MaskProbe()
    block = ResidualBlock(probe)
    block(state()), block(state())
    assert not torch.equal(*probe.masks())


def test_evaluate_draws_for_one_call_and_joins_the_solve_it_stands_in():
    torch.manual_seed(0)
    probe = MaskProbe()
    evaluate(probe, 0.5, state()), evaluate(probe, 0.5, state())
    assert not torch.equal(*probe.masks())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MaskProbe()

        def forward(self, t, h):
            return evaluate(self.inner, t, h)

    outer = Outer()
    ODEBlock(outer, "rk4", steps=2)(state())
    assert all(torch.equal(mask, outer.inner.seen[0][1]) for mask in outer.inner.masks())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_that_needs_the_time_is_told_it_while_a_graph_is_traced(monkeypatch, wrapped):
    """torch.compile traces ``evaluate`` without a context, which it could not trace, unless a layer needs one."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    branch = Normed()
    index_statistics(branch, (0.0, 0.5))
    # What is no module does not say what is in it.
    evaluate((lambda t, h: branch(t, h)) if wrapped else branch, 0.5, 1.0 + torch.rand(3, 4, 2, 2))
    assert torch.equal(branch.norm.running_mean[0], torch.zeros(4))
    assert not torch.equal(branch.norm.running_mean[1], torch.zeros(4))


def test_a_layer_that_does_not_need_the_time_is_traced_without_a_context(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    probe = MaskProbe()
    met = []
    probe.register_forward_pre_hook(lambda *_: met.append(current()))
    evaluate(probe, 0.5, state())
    assert met == [None]


def test_the_context_ends_with_the_evaluation_even_when_the_branch_fails():
    seen = []

    class Fails(nn.Module):
        def forward(self, t, h):
            seen.append(current())
            raise RuntimeError("as it should")

    assert current() is None
    with pytest.raises(RuntimeError, match="as it should"):
        ODEBlock(Fails())(state())
    assert isinstance(seen[0], SolveContext)
    assert current() is None


def test_an_ode_block_inside_a_residual_branch_has_its_own_context_and_leaves_the_outer_one():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = Dropout(0.5)
            self.block = ODEBlock(MaskProbe(), "rk4", steps=2)
            self.contexts = []

        def forward(self, t, h):
            self.contexts.append(current())
            h = self.drop(self.block(self.drop(h)))
            self.contexts.append(current())
            return h

    outer = Outer()
    ResidualBlock(outer)(state())
    before, after = outer.contexts
    assert before is after
    assert before is not None
    inner = outer.block.branch
    assert all(torch.equal(mask, inner.seen[0][1]) for mask in inner.masks())


class TimeProbe(nn.Module):
    breakpoints = (0.25, 0.5)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, t, h):
        self.seen.append((float(t), interval_time(t)))
        return -h


def test_interval_time_is_the_time_outside_a_solve():
    assert interval_time(0.3) == 0.3
    assert interval_time(torch.tensor(0.25)) == 0.25


def test_interval_time_lies_strictly_inside_the_step_at_every_stage():
    probe = TimeProbe()
    ODEBlock(probe, "rk4", steps=4)(state())
    for i, (_, inside) in enumerate(probe.seen):
        step = i // 4
        assert 0.25 * step < inside < 0.25 * (step + 1)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_interval_time_lies_in_the_piece_of_an_adaptive_solve_on_both_ways(gradient):
    probe = TimeProbe()
    x = state()
    out = ODEBlock(probe, "dopri5", rtol=1e-6, atol=1e-6, gradient=gradient)(x)
    out.sum().backward()
    ends = (0.0, 0.25, 0.5, 1.0)
    pieces = list(pairwise(ends))
    found = set()
    for t, inside in probe.seen:
        piece = next((a, b) for a, b in pieces if a < inside < b)
        assert piece[0] <= t <= piece[1]
        found.add(piece)
    assert found == set(pieces)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_what_a_solve_held_is_freed_with_its_output(solver, gradient):
    """No cycle keeps the context, its masks and its graph alive (torchdiffeq's adjoint leaked through one)."""
    held = []

    class Holds(MaskProbe):
        def forward(self, t, h):
            held.append(weakref.ref(current()))
            return super().forward(t, h)

    block = ODEBlock(Holds(), solver, steps=None if solver == "dopri5" else 2, gradient=gradient)
    out = block(state())
    assert held[0]() is not None or gradient == "backprop"
    out.sum().backward()
    del out
    assert all(ref() is None for ref in held)
