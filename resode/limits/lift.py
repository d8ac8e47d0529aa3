"""A trained residual net as a continuous one: its blocks as values of weights θ(t).

In each stage the run of L blocks that keep the shape becomes one ODE block on [0, 1]. Block l has the weights of the
time t_l = l/L, so that with Δ = 1/L

    h_{l+1} = h_l + s_l·f(θ_l, h_l) = h_l + Δ·F(t_l, h_l),    F(t, h) = L·s(t)·f(θ(t), h),

and Euler's method with L steps makes the same network. Any finer solve then answers what the net would do if it were an
ODE (Queiruga et al. 2020, arXiv 2008.02389; Sander et al. 2022, arXiv 2205.14612).
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from resode.blocks.alike import difference
from resode.blocks.branch import Branch
from resode.blocks.derived import Gain, Held, Scaled, Varying, frozen
from resode.blocks.ode import ODEBlock, ode_blocks
from resode.blocks.projected import ProjectedODE
from resode.blocks.residual import ResidualBlock
from resode.blocks.solvers import check_breakpoints, uniform_grid
from resode.blocks.varying import stack_parameters, varying_layers
from resode.errors import InvalidInput, choose
from resode.layers.basis import Basis, knots_of
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout
from resode.layers.factors import multiply_out
from resode.layers.norm import BatchNorm
from resode.nets.net import PlainLayer
from resode.nets.sequences import block_sequences, fill, runs

LIFTED = ("constant", "linear")
CLOSE = 1e-9


def lift(net: nn.Module, basis: str = "constant") -> nn.Module:
    """A copy of ``net`` in which the residual blocks that keep the shape are the Euler steps of ODE blocks.

    Args:
        net: a net of ours with residual blocks, or any module that holds them in an ``nn.Sequential``. Transitions
            (blocks that change the shape, poolings) stay as they are, and end a run of blocks.
        basis: how θ(t) goes on from block to block: "constant" (block l's on [l/L, (l + 1)/L)), or "linear" (from block
            l's at l/L to that of block l + 1, and from the last block's at (L − 1)/L on as it is).

    What becomes of the parts of a block:

    * Weights (and affine maps of norms) are stacked on the basis, to be trained on. A branch that all blocks of a run
      share is the field itself, and its weights stay as they are (if they vary with t, and jump or bend between two
      blocks, their values at the blocks are stacked).
    * Running statistics of batch norms become functions of t, linear between the times of the blocks, for both bases.
    * The scale, times L, goes into the field, where the scales of SkipInit are weights like others.
    * Dropout draws a mask for each of the L intervals, as the blocks do. Where it differs from block to block (a linear
      schedule) the field has the mean of its probabilities.
    * What follows the addition, as in h ← ReLU(h + f), becomes a projection after each step (``ProjectedODE``): no
      field has such steps, so Euler's method alone makes them. One that is no projection (tanh, GELU), to which once
      more makes a difference, has no limit as the steps get small, and finer solves approach no flow.

    Raises:
        InvalidInput: for a net without residual blocks that keep the shape, or with some outside of any
            ``nn.Sequential``; and for blocks of one run that do not make one field: they differ in more than their
            weights, only some follow the addition by an activation, or their times are neither evenly spaced nor all
            the same.
    """
    choose(basis, LIFTED, "basis to lift weights on")
    if not block_sequences(net):
        raise InvalidInput(f"this {type(net).__name__} cannot be lifted: {_why_not(net)}")
    lifted = copy.deepcopy(net)
    multiply_out(lifted)
    for sequence in block_sequences(lifted):
        made = ([_flow(group, basis)] if keeps else group for keeps, group in runs(sequence))
        fill(sequence, [module for group in made for module in group])
    return lifted


def _why_not(net: nn.Module) -> str:
    if ode_blocks(net):
        return "it is continuous already, and its residual blocks are transitions"
    if any(isinstance(module, PlainLayer) for module in net.modules()):
        return "its layers have no shortcut, so none is a step of a flow; take a net of kind resnet"
    return "it holds no residual block of ours (resode.ResidualBlock) that keeps the shape; build one of those"


def _flow(blocks: list[ResidualBlock], basis: str) -> ODEBlock:
    """The run of ``blocks`` as one ODE block. The blocks are used up."""
    L, first = len(blocks), blocks[0]
    t0, t1, moves = _interval([block.t for block in blocks])
    on = Basis(basis, knots_of(basis, L), t0, t1)
    branch = _scaled(_field(blocks, on, moves), [block.scale for block in blocks], (t1 - t0) / L, on)
    settings = {"t0": t0, "t1": t1, "mask_intervals": L if _draws(branch) else 1, "knots": L + 1}
    post = _post(blocks)
    flow = ProjectedODE(branch, post, L, **settings) if post else ODEBlock(branch, "euler", L, **settings)
    flow.training = first.training
    return flow


def _interval(times: Sequence[float]) -> tuple[float, float, bool]:
    """The interval that blocks at ``times`` go through, and whether they do (or all stand at one time)."""
    L = len(times)
    if L == 1:
        return times[0], times[0] + 1.0, True
    gaps = [after - before for before, after in pairwise(times)]
    if not any(gaps):
        return 0.0, 1.0, False
    gap = (times[-1] - times[0]) / (L - 1)
    if gap <= 0 or any(abs(each - gap) > CLOSE for each in gaps):
        raise InvalidInput(
            f"blocks at times {', '.join(f'{t:g}' for t in times)}: evenly spaced ones are expected, such as l/L, or "
            "the same for all"
        )
    return times[0], round(times[0] + L * gap, 12), True


def _field(blocks: list[ResidualBlock], basis: Basis, moves: bool) -> nn.Module:
    """The branches of ``blocks`` as one, without their scales."""
    branch = blocks[0].branch
    if len(blocks) > 1 and all(block.branch is branch for block in blocks):
        if not moves:
            return _held(frozen(branch, blocks[0].t), blocks[0].t)
        if _varies_with(branch, len(blocks), basis):
            return branch
    branches = [frozen(block.branch, block.t) for block in blocks]
    if not moves:
        branches = [_held(each, blocks[0].t) for each in branches]
    for i, each in enumerate(branches):
        if found := difference(branches[0], each):
            raise InvalidInput(f"blocks 1 and {i + 1} of a run are no values of one field: {found}")
    _merge_statistics(branches, basis)
    _merge_dropout(branches)
    return _stacked(branches, basis)


def _varies_with(branch: nn.Module, steps: int, basis: Basis) -> bool:
    """Whether the weights of ``branch``, if they vary, do so over the span of ``basis``, and smoothly within a step."""
    try:
        check_breakpoints(uniform_grid(basis.t0, basis.t1, steps), getattr(branch, "breakpoints", ()))
    except InvalidInput:
        return False
    return all((own.basis.t0, own.basis.t1) == (basis.t0, basis.t1) for own in varying_layers(branch))


def _held(branch: nn.Module, t: float) -> nn.Module:
    """``branch``, of blocks that all stand at time ``t``: the field must not depend on the time."""
    return branch if isinstance(branch, Branch) and branch.time == "none" else Held(branch, t)


def _stacked(branches: list[nn.Module], basis: Basis) -> nn.Module:
    """One branch whose parameters are those of ``branches`` on ``basis``; a knot at its end has those of the last."""
    branch = stack_parameters([*branches, *branches[-1:] * (basis.knots - len(branches))], basis.knots)
    if not isinstance(branch, Branch):
        return Varying(branch, basis)
    branch.layers.basis = basis
    if branch.time == "none":
        branch.time = basis.kind
    return branch


def _merge_statistics(branches: list[nn.Module], basis: Basis) -> None:
    """Let the batch norms of the first branch hold the statistics of all, each at the time of its block."""
    L = len(branches)
    width = (basis.t1 - basis.t0) / L
    for norms in zip(*(_of_kind(branch, BatchNorm) for branch in branches), strict=True):
        if norms[0].track_running_stats and L > 1:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(norms[0], name, torch.stack([getattr(norm, name) for norm in norms]))
        norms[0].knots = tuple(basis.t0 + i * width for i in range(L))


def _merge_dropout(branches: list[nn.Module]) -> None:
    """Let the layers of the first branch drop with the mean of the probabilities of all."""
    for name, kinds in (("p", Dropout), ("dropconnect", Conv2d | Linear)):
        for layers in zip(*(_of_kind(branch, kinds) for branch in branches), strict=True):
            rates = [getattr(layer, name) for layer in layers]
            if len(set(rates)) > 1 and not layers[0].inverted:
                raise InvalidInput(
                    f"dropout of {rates[0]:g} to {rates[-1]:g} from block to block, not inverted, is in evaluation a "
                    "factor that differs from block to block: train with inverted=True or a constant schedule"
                )
            setattr(layers[0], name, rates[0] + sum(rate - rates[0] for rate in rates) / len(rates))


def _draws(branch: nn.Module) -> bool:
    layers = _of_kind(branch, Dropout | Conv2d | Linear)
    return any(getattr(layer, "p", 0.0) or getattr(layer, "dropconnect", 0.0) for layer in layers)


def _of_kind(branch: nn.Module, kind: type) -> list[nn.Module]:
    return [layer for layer in branch.modules() if isinstance(layer, kind)]


def _scaled(branch: nn.Module, scales: list[float | Tensor], step: float, basis: Basis) -> nn.Module:
    """``branch`` times scale/Δ."""
    learned = [isinstance(scale, Tensor) for scale in scales]
    if not any(learned) and len(set(scales)) == 1:
        factor = scales[0] / step
        return branch if abs(factor - 1.0) < 1e-12 else Scaled(branch, Gain(factor))
    if all(learned) and all(scale is scales[0] for scale in scales):
        return Scaled(branch, Gain(1.0 / step, scales[0]))
    if any(learned) and not all(learned):
        raise InvalidInput("some blocks of a run have a scale that is learned, and some a fixed number: use one kind")
    if not any(learned):
        like = next(branch.parameters(), torch.empty((), dtype=torch.float64))
        scales = [nn.Parameter(torch.tensor(s, dtype=like.dtype, device=like.device), False) for s in scales]
    gains = [Gain(1.0 / step, scale) for scale in scales]
    return Scaled(branch, stack_parameters([*gains, *gains[-1:] * (basis.knots - len(gains))], basis.knots), basis)


def _post(blocks: list[ResidualBlock]) -> nn.Module | None:
    """What follows the addition in all ``blocks``; None if nothing does."""
    post = blocks[0].post
    for i, block in enumerate(blocks):
        if found := difference(post, block.post):
            raise InvalidInput(f"what follows the addition in blocks 1 and {i + 1} of a run: {found}; use one for all")
    if any(block.post is not post and any(True for _ in block.post.parameters()) for block in blocks):
        raise InvalidInput(
            f"each block of a run is followed by a {type(post).__name__} with parameters of its own: share one"
        )
    return None if isinstance(post, nn.Identity) else post
