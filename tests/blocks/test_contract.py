"""The contract of a solve in every gradient mode: what counts once, what is drawn once, what backward leaves alone."""

import pytest
import torch
from torch import nn

from resode.blocks.branch import Branch
from resode.blocks.ode import ODEBlock
from resode.blocks.settings import GRADIENTS
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput
from resode.layers.dropout import DROPOUTS, MASKS, unit_mask
from resode.layers.dropout import Dropout as DropoutLayer
from resode.layers.norm import BatchNorm
from resode.stack import Dropout, Stack

SOLVERS = {"rk4": {"steps": 4}, "dopri5": {"rtol": 1e-3, "atol": 1e-3}, "adaptive_heun": {"rtol": 1e-2, "atol": 1e-2}}
both = pytest.mark.parametrize("solver", SOLVERS)
every_mode = pytest.mark.parametrize("gradient", GRADIENTS)


def state(seed=0):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


class Bump(nn.Module):
    """A branch that is 20 times as fast for a while, so that an error control rejects steps."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, t, h):
        return self.branch(t, h) * (1.0 + 20.0 * torch.exp(-(((torch.as_tensor(t) - 0.6) / 0.1) ** 2)))


def block_of(solver, gradient="backprop", kind="unit", bump=False, **settings):
    torch.manual_seed(0)
    stack = Stack(activation="tanh", dropout=Dropout(kind, 0.3), conv="weight-standardized")
    branch = Branch(4, stack, time="concat").double()
    return ODEBlock(Bump(branch) if bump else branch, solver, gradient=gradient, **{**SOLVERS[solver], **settings})


def buffers(block):
    return {name: value.clone() for name, value in block.named_buffers()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- running statistics ----------------------------------------------------------------------------------------------


@every_mode
@both
def test_a_forward_solve_counts_as_one_batch_and_the_backward_pass_as_none(solver, gradient):
    block = block_of(solver, gradient, bump=True, coupling=0.999)
    for solves in (1, 2, 3):
        before = buffers(block)
        loss = block(state(solves)).square().sum()
        after = buffers(block)
        loss.backward()
        assert same(buffers(block), after), "recomputations and adjoint solves are no batches"
        for name, value in after.items():
            assert not torch.equal(value, before[name])
            if name.endswith("num_batches_tracked"):
                assert (value == solves).all()
    assert block.stats.nfe_backward > 0 or gradient == "backprop"


@every_mode
def test_the_statistics_are_those_of_the_same_steps_whatever_differentiates_them(gradient):
    """Reversible steps evaluate f elsewhere; the other three are one solve."""
    plain, other = block_of("dopri5"), block_of("dopri5", gradient)
    for block in (plain, other):
        torch.manual_seed(1)
        block(state()).sum().backward()
    assert same(buffers(plain), buffers(other)) == (gradient != "reversible")


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun"])
def test_moments_met_in_rejected_steps_do_not_count(solver, gradient, monkeypatch):
    met, absorb = [], BatchNorm.absorb

    def watched(self, times, *rest, **more):
        met.append(times)
        absorb(self, times, *rest, **more)

    monkeypatch.setattr(BatchNorm, "absorb", watched)
    block = block_of(solver, gradient, bump=True)
    block(state()).sum().backward()
    stats, tableau = block.stats, TABLEAUX[solver]
    assert stats.rejected > 0
    # f at the start of a step is that at the end of the one before, if the pair has that; a probe chose the first step.
    starts = 1 if tableau.fsal else stats.accepted
    assert stats.nfe_forward == 1 + starts + (tableau.stages - 1) * (stats.accepted + stats.rejected)
    assert [len(times) for times in met] == 2 * [starts + (tableau.stages - 1) * stats.accepted], "two norms"


# --- randomness ------------------------------------------------------------------------------------------------------


@every_mode
@both
def test_the_backward_pass_draws_nothing(solver, gradient):
    loss = block_of(solver, gradient, bump=True, coupling=0.999)(state()).square().sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@every_mode
@pytest.mark.parametrize("kind", DROPOUTS)
def test_every_solve_draws_the_same_amount_whatever_its_steps(kind, gradient):
    """Stages, rejected steps and estimates of the error share the masks of the solve."""
    left = set()
    for solver, settings in (*SOLVERS.items(), ("rk4", {"steps": 9}), ("euler", {"steps": 1})):
        block = block_of("rk4", gradient, kind, bump=True, coupling=0.999)
        block.solver, block.steps, block.rtol, block.atol = (
            solver, settings.get("steps"), settings.get("rtol"), settings.get("atol"))  # fmt: skip
        torch.manual_seed(1)
        block(state())
        left.add(tuple(torch.get_rng_state().tolist()))
    assert len(left) == 1
    torch.manual_seed(1)
    assert left != {tuple(torch.get_rng_state().tolist())}


@every_mode
@both
def test_a_new_forward_draws_new_masks_and_evaluation_none(solver, gradient):
    block, x = block_of(solver, gradient), state()
    assert not torch.equal(block(x), block(x))
    block.eval()
    before = torch.get_rng_state()
    assert torch.equal(block(x), block(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def drawn(monkeypatch):
    """The masks of unit dropout that are drawn."""
    masks, draw = [], unit_mask

    def watched(x, p):
        masks.append(draw(x, p))
        return masks[-1]

    monkeypatch.setitem(MASKS, "unit", watched)
    return masks


@every_mode
@both
@pytest.mark.parametrize("intervals", [1, 2])
def test_monte_carlo_dropout_draws_one_mask_a_solve_and_interval_for_all_stages(intervals, solver, gradient, drawn):
    """The net in evaluation with its dropout layers alone in training: samples of the predictive distribution."""
    block = block_of(solver, gradient, mask_intervals=intervals).eval()
    for layer in block.modules():
        if isinstance(layer, DropoutLayer):
            layer.train()
    x, before = state(), buffers(block)
    outs = [block(x) for _ in range(3)]
    assert len(drawn) == 3 * intervals
    assert len({mask.sum().item() for mask in drawn}) > 1
    assert not torch.equal(outs[0], outs[1])
    sum(out.square().sum() for out in outs).backward()
    assert len(drawn) == 3 * intervals
    assert same(buffers(block), before), "batch norms are in evaluation"


def test_masks_of_intervals_ask_a_fixed_grid_for_their_ends_only_where_something_is_drawn():
    block = block_of("rk4", mask_intervals=2)
    block.steps = 3
    with pytest.raises(InvalidInput, match=r"breakpoint t = 0\.5"):
        block(state())
    block.eval()(state())


@every_mode
@both
def test_the_solve_is_as_it_was_begun_when_the_module_changes_to_evaluation_before_backward(solver, gradient):
    """A validation pass between the two: the backward pass is still that of a training solve, with its masks."""
    found = []
    for change in (False, True):
        block, x = block_of(solver, gradient), state()
        torch.manual_seed(1)
        loss = block(x).square().sum()
        if change:
            block.eval()
            block(x)
        found.append(torch.autograd.grad(loss, (x, *block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- autocast --------------------------------------------------------------------------------------------------------


class Notes(nn.Module):
    """A convolution and tanh, with an account of each evaluation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.seen = []

    def forward(self, t, h):
        out = torch.tanh(self.conv(h))
        self.seen.append((float(t), h.detach().clone(), out.detach().clone(), torch.is_autocast_enabled("cpu")))
        return out


@every_mode
@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_the_backward_pass_meets_the_values_of_the_forward_pass(gradient, inside):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5).requires_grad_()
    block = ODEBlock(Notes(), "rk4", steps=3, gradient=gradient)
    with torch.autocast("cpu", torch.bfloat16):
        loss = block(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    count = block.stats.nfe_forward
    forward, backward = block.branch.seen[:count], block.branch.seen[count:]
    assert {out.dtype for _, _, out, _ in block.branch.seen} == {torch.bfloat16}
    assert {h.dtype for _, h, _, _ in block.branch.seen} == {torch.float32}
    assert all(cast for *_, cast in block.branch.seen)
    if gradient == "backprop":
        assert backward == []
    elif gradient == "checkpoint":  # bit for bit: its steps from the last to the first, the stages of each in order
        assert len(backward) == count == 12
        for i, (t, h, out, _) in enumerate(backward):
            same_step = forward[count - 4 * (i // 4 + 1) + i % 4]
            assert t == same_step[0]
            assert torch.equal(h, same_step[1])
            assert torch.equal(out, same_step[2])
    else:  # the states are reconstructed: near those of the forward pass, at the same times
        for t, h, _, _ in backward:
            near = [(h - other).abs().max() for time, other, *_ in forward if time == pytest.approx(t)]
            assert near
            assert min(near) < (1e-4 if gradient == "reversible" else 2e-2)


def test_under_autocast_checkpoints_gradient_is_near_backpropagations():
    """The latter sums the weights' gradient over the stages in bfloat16, the former over the steps in float32."""
    torch.manual_seed(0)
    branch, x = Notes(), torch.randn(2, 4, 5, 5).requires_grad_()
    found = []
    for gradient in ("backprop", "checkpoint"):
        with torch.autocast("cpu", torch.bfloat16):
            out = ODEBlock(branch, "rk4", steps=3, gradient=gradient)(x)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, *branch.parameters()))))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() < 4 * torch.finfo(torch.bfloat16).eps * b.norm()
