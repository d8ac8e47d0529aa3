"""Finer and coarser nets: the same dynamics, with steps of 1/r of their size or r times it.

A residual net is refined by r copies of each block with 1/r of its scale, an ODE net by r times as many steps, with
its weights θ(t) on a finer basis, where they are the same function of t. Both then make smaller steps of the same
method for the same field, so that outputs change by the solver's error alone, O(Δ^p) at order p. Training goes on from
there (multi-level training: Chang et al. 2018, arXiv 1710.10348; Queiruga et al. 2020, arXiv 2008.02389).

**What the optimizer remembers.** Where θ gives way to r values θ_j that act on 1/r of its interval each, the loss is,
to first order in Δ, a function of their mean: ∂ℓ/∂θ_j = (1/r)·∂ℓ/∂θ. So a momentum is carried to each of them times
1/r, and an average of squares times 1/r². What acts on the whole interval as before (a branch that all blocks share,
the coefficients of a Fourier basis) keeps its own. A learned scale α gives way to r values α_j = α/r, whose sum counts:
∂ℓ/∂α_j = ∂ℓ/∂α.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resode.blocks.alike import difference
from resode.blocks.compiled import Compiler
from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.blocks.varying import Layers, varying_layers
from resode.errors import InvalidInput
from resode.layers.factors import refuse_factorized
from resode.layers.norm import BatchNorm
from resode.nets.resample import Coarser, Finer, mean
from resode.nets.sequences import block_sequences, fill, outside_branches, runs
from resode.nets.transfer import Carry, Memory, Transfer


def refine(net: nn.Module, factor: int = 2) -> nn.Module:
    """A copy of ``net`` with ``factor`` times the steps in each stage.

    Residual blocks that keep the shape are copied ``factor`` times, each with 1/factor of the scale, at times in
    between (a branch that all blocks of a run share stays shared). ODE blocks make ``factor`` times the steps: pieces
    of θ(t) are cut, and knots of it, and of running statistics, inserted, so that both are the same functions of t; a
    Fourier basis stays as it is. Mask intervals are cut where there are several (one is once a solve, at any depth).
    Transitions stay, and so does what stands within a branch. What follows the addition in a block follows it in each
    of its copies: it should be a projection, such as the ReLU of post-activation blocks, to which once more makes no
    difference. With another (tanh, GELU) the finer net is another one, however small its steps.

    Raises:
        InvalidInput: for a factor below 2; for a net with nothing to refine; for an ODE block that chooses its steps;
            for blocks that stand outside of any ``nn.Sequential`` or in several places, or that share some of their
            parameters, but not all; for weights that are products of factors.
    """
    fine = copy.deepcopy(net)
    refine_(fine, factor)
    return fine


def coarsen(net: nn.Module, factor: int = 2) -> nn.Module:
    """A copy of ``net`` with 1/``factor`` of the steps in each stage: the inverse of :func:`refine`.

    Where ``factor`` neighbours are no longer equal, since the net was trained on, the coarser net has the mean of their
    weights and statistics, the nearest function that is constant on the longer pieces; of a function that is linear
    between knots it has the values at the knots that stay.

    Raises:
        InvalidInput: as :func:`refine`; for a number of blocks, steps, pieces or intervals that ``factor`` does not
            divide; for neighbouring blocks that differ in more than their weights.
    """
    coarse = copy.deepcopy(net)
    coarsen_(coarse, factor)
    return coarse


def refine_(net: nn.Module, factor: int = 2, optimizer: Optimizer | None = None) -> None:
    """:func:`refine` in place, and with it the ``optimizer`` of the net, so that training can go on.

    What SGD, Adam and AdamW remember of the gradients is carried over (see the head of this module). If anything is
    refused, net and optimizer are as they were.

    Raises:
        InvalidInput: as :func:`refine`, and for another optimizer.
    """
    _change(net, Finer(check_factor(factor)), optimizer)


def coarsen_(net: nn.Module, factor: int = 2, optimizer: Optimizer | None = None) -> None:
    """:func:`coarsen` in place, and with it the ``optimizer``: the inverse of :func:`refine_`.

    Raises:
        InvalidInput: as :func:`coarsen`, and for another optimizer.
    """
    _change(net, Coarser(check_factor(factor)), optimizer)


def check_factor(factor: int) -> int:
    """Return ``factor`` if depths can be changed by it.

    Raises:
        InvalidInput: when it is no whole number of at least 2.
    """
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
        raise InvalidInput(f"factor is {factor!r}: a whole number of at least 2 is expected")
    return factor


@dataclass
class _Plan:
    """What is to become of a net: parameters made of others, and what else is to be done once nothing can fail."""

    transfers: list[Transfer] = field(default_factory=list)
    rest: list[Callable[[], object]] = field(default_factory=list)

    def add(self, new: nn.Parameter, old: Iterable[nn.Parameter], carry: Carry) -> None:
        self.transfers.append(Transfer(new, tuple(old), carry))

    def later(self, act: Callable[..., object], *arguments: object) -> None:
        self.rest.append(partial(act, *arguments))

    @torch.no_grad()
    def carry_out(self, optimizer: Optimizer | None) -> None:
        """All of it, in the net and its ``optimizer``."""
        memory = None if optimizer is None else Memory(optimizer, self.transfers)
        values = [transfer.carry([old.detach() for old in transfer.old], 0) for transfer in self.transfers]
        for transfer, value in zip(self.transfers, values, strict=True):
            transfer.new.data = value.clone()
            transfer.new.grad = None
        for act in self.rest:
            act()
        if memory is not None:
            memory.commit()


def _change(net: nn.Module, change: Finer | Coarser, optimizer: Optimizer | None) -> None:
    refuse_factorized(net, "refining or coarsening it")
    flows = [module for _, module in outside_branches(net) if isinstance(module, ODEBlock)]
    sequences = block_sequences(net)
    if not flows and not sequences:
        raise InvalidInput(
            f"this {type(net).__name__} has no depth to change: neither an ODE block, nor a residual block (of "
            "resode's) that keeps the shape"
        )
    plan = _Plan()
    _refuse_sharing(sequences)
    for sequence in sequences:
        made = [_run(group, change, plan) if keeps else group for keeps, group in runs(sequence)]
        plan.later(fill, sequence, [module for group in made for module in group])
    for flow in flows:
        _flow(flow, change, plan)
    fields = [flow.branch for flow in flows]
    for norm in dict.fromkeys(part for branch in fields for part in branch.modules() if isinstance(part, BatchNorm)):
        plan.later(norm.set_knots, change.times(norm.knots))
    fields += [run[0].branch for run in _all_runs(sequences) if _is_tied(run)]
    for layers in dict.fromkeys(layers for branch in fields for layers in varying_layers(branch)):
        _basis(layers, change, plan)
    plan.carry_out(optimizer)


# --- residual blocks --------------------------------------------------------------------------------------------------


def _all_runs(sequences: Sequence[nn.Sequential]) -> list[list[ResidualBlock]]:
    return [run for sequence in sequences for keeps, run in runs(sequence) if keeps]


def _is_tied(run: Sequence[ResidualBlock]) -> bool:
    return len(run) > 1 and all(block.branch is run[0].branch for block in run)


def _own_parameters(block: ResidualBlock, tied: bool) -> dict[str, nn.Parameter]:
    """The parameters of ``block``, by name, but for those that all blocks share."""
    return {name: p for name, p in block.named_parameters() if not (tied and name.startswith("branch."))}


def _refuse_sharing(sequences: Sequence[nn.Sequential]) -> None:
    blocks: set[ResidualBlock] = set()
    owners: dict[nn.Parameter, ResidualBlock] = {}
    for run in _all_runs(sequences):
        tied = _is_tied(run)
        for block in run:
            if block in blocks:
                raise InvalidInput(
                    "a residual block stands in several places of the net: give each place a block of its own (with "
                    "the same branch, if it is to be shared)"
                )
            blocks.add(block)
            for name, p in _own_parameters(block, tied).items():
                if owners.setdefault(p, block) is not block:
                    raise InvalidInput(
                        f"blocks share some of their parameters ({name}, for one) and not all: share the whole branch "
                        "among all the blocks of a stage, or nothing"
                    )


def _run(run: list[ResidualBlock], change: Finer | Coarser, plan: _Plan) -> list[ResidualBlock]:
    """What stands for the blocks of one run."""
    make = _finer_run if isinstance(change, Finer) else _coarser_run
    made, times = make(run, change, plan)
    for block, t in zip(made, times, strict=True):
        plan.later(setattr, block, "t", t)
    if _is_tied(run):
        met_at = [block.t for block in run]
        for norm in run[0].branch.modules():
            if isinstance(norm, BatchNorm) and list(norm.knots) == met_at:
                plan.later(norm.set_knots, times)
    return made


def _finer_run(run: list[ResidualBlock], change: Finer, plan: _Plan) -> tuple[list[ResidualBlock], list[float]]:
    r, tied = change.factor, _is_tied(run)
    times = [block.t for block in run]
    # The last step is as long as the one before it; a single one is a whole interval.
    times = change.times([*times, 2 * times[-1] - times[-2] if len(times) > 1 else times[0] + 1.0])[:-1]
    made = []
    for block in run:
        shared = {id(block.branch): block.branch} if tied else {}
        copies = [block, *(copy.deepcopy(block, dict(shared)) for _ in range(r - 1))]
        for name, p in _own_parameters(block, tied).items():
            for each in copies:
                plan.add(each.get_parameter(name), [p], partial(_spread_scale if name == "scale" else _spread, r))
        if not isinstance(block.scale, Tensor):
            for each in copies:
                plan.later(setattr, each, "scale", block.scale / r)
        made += copies
    return made, times


def _coarser_run(run: list[ResidualBlock], change: Coarser, plan: _Plan) -> tuple[list[ResidualBlock], list[float]]:
    r, tied = change.factor, _is_tied(run)
    change.count(len(run), "residual blocks of a stage")
    groups = [run[i : i + r] for i in range(0, len(run), r)]
    for i, group in enumerate(groups):
        first = group[0]
        for j, block in enumerate(group):
            if found := difference(first, block):
                raise InvalidInput(f"blocks {i * r + 1} and {i * r + j + 1} of a stage cannot be made one: {found}")
        for name, p in _own_parameters(first, tied).items():
            olds = [p, *(block.get_parameter(name) for block in group[1:])]
            plan.add(p, olds, partial(_gather_scale if name == "scale" else _gather, r))
        if not isinstance(first.scale, Tensor):
            plan.later(setattr, first, "scale", r * first.scale)  # they do not differ in it
        if not tied:
            plan.later(_average_buffers, group)
    return [group[0] for group in groups], [group[0].t for group in groups]


def _spread(r: int, of: Sequence[Tensor], power: int) -> Tensor:
    return of[0] * r**-power


def _gather(r: int, of: Sequence[Tensor], power: int) -> Tensor:
    return mean(of) * r**power


def _spread_scale(r: int, of: Sequence[Tensor], power: int) -> Tensor:
    return of[0] / r if power == 0 else of[0]


def _gather_scale(r: int, of: Sequence[Tensor], power: int) -> Tensor:
    return mean(of) * r if power == 0 else mean(of)


def _average_buffers(group: Sequence[ResidualBlock]) -> None:
    for name, buffer in group[0].named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean([block.get_buffer(name) for block in group]))


# --- ODE blocks -------------------------------------------------------------------------------------------------------


def _flow(block: ODEBlock, change: Finer | Coarser, plan: _Plan) -> None:
    if block.grid_steps is None:
        raise InvalidInput(
            f"an ODE block solved by {block.solver} to a tolerance chooses its steps, at any depth: give it a number "
            "of steps, or change its tolerances"
        )
    plan.later(setattr, block, "steps", change.count(block.grid_steps, "steps of an ODE block"))
    if block.mask_intervals > 1:
        plan.later(setattr, block, "mask_intervals", change.count(block.mask_intervals, "mask intervals"))
    # What was traced for the old basis is of no more use.
    plan.later(setattr, block, "_compiler", Compiler(block._compiler.mode))


def _basis(layers: Layers, change: Finer | Coarser, plan: _Plan) -> None:
    """Put the parameters of ``layers`` on a basis of other pieces or knots."""
    basis = layers.basis
    if basis.kind == "fourier" or (basis.kind == "linear" and basis.knots == 1):
        return
    ends = int(basis.kind == "linear")
    knots = change.count(basis.knots - ends, "pieces of weights that vary") + ends

    def carry(of: Sequence[Tensor], power: int) -> Tensor:
        return change.rows(of[0], basis.kind, power)

    for stacked in layers.parameters():
        plan.add(stacked, [stacked], carry)
    plan.later(setattr, layers, "basis", replace(basis, knots=knots))
