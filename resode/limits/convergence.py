"""Convergence in the number of steps: is a trained ODE net the flow it claims to be?

A net whose blocks are near an ODE gives the same answers with any solver that is accurate enough, and its error
against the exact flow falls at the solver's order. One that has fitted its own coarse grid does not
(Ott et al. 2021, arXiv 2007.15386; Queiruga et al. 2020, arXiv 2008.02389).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from resode.blocks.ode import ODEBlock, solver_settings
from resode.blocks.settings import check_solver
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput, choose
from resode.nets.net import evaluating

STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Evaluation:
    """One net evaluated with ``solver`` and ``steps`` steps in each ODE block.

    ``logit_error`` is ‖z − z*‖₂/‖z*‖₂ over all samples, with z* the logits of the reference solve; ``order`` is the
    slope of its logarithm from the evaluation of half as many steps (None where there is none). ``nfe`` counts the
    evaluations of f in one forward pass.
    """

    solver: str
    steps: int
    nfe: int
    accuracy: float
    loss: float
    logit_error: float
    order: float | None


@dataclass(frozen=True)
class ConvergenceTable:
    """Evaluations on ``count`` samples against a reference solve of ``reference_steps`` steps of rk4."""

    count: int
    reference_steps: int
    reference_accuracy: float
    reference_loss: float
    trained: tuple[tuple[str, int | None], ...]
    evaluations: tuple[Evaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ConvergenceTable":
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{
                **values,
                "trained": tuple((solver, steps) for solver, steps in values["trained"]),
                "evaluations": tuple(Evaluation(**e) for e in values["evaluations"]),
            }
        )


def convergence(
    net: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    steps: Sequence[int] = STEPS,
    solvers: Sequence[str] | None = None,
    *,
    reference_steps: int | None = None,
    progress: bool = False,
) -> ConvergenceTable:
    """Logits, accuracy and loss of ``net`` with each solver and number of steps, against a reference solve.

    Args:
        net: a trained net with ODE blocks; its settings are restored afterwards.
        data: pairs (x, labels), gone through once for each evaluation.
        steps: numbers of steps, increasing.
        solvers: fixed-step solvers; if None, the one of the net's first block (rk4 if that is adaptive).
        reference_steps: steps of rk4 in the reference; twice the largest of ``steps`` if None.

    Raises:
        InvalidInput: for a net without ODE blocks, a solver without fixed steps, no steps or steps below 1, or no
            data.
    """
    blocks = [block for block in net.modules() if isinstance(block, ODEBlock)]
    if not blocks:
        raise InvalidInput(
            f"convergence in the number of steps needs a net with ODE blocks, and this {type(net).__name__} has none"
        )
    own = blocks[0].solver if blocks[0].solver in TABLEAUX and blocks[0].grid_steps is not None else "rk4"
    solvers = tuple(choose(s, TABLEAUX, "fixed-step solver") for s in (solvers or (own,)))
    if not steps:
        raise InvalidInput("convergence needs numbers of steps to evaluate the net with, and there is none")
    reference_steps = 2 * max(steps) if reference_steps is None else reference_steps
    for n in (*steps, reference_steps):
        check_solver("rk4", n)
    data = list(data)
    plans = [("rk4", reference_steps), *((solver, n) for solver in solvers for n in sorted(steps))]
    found = [
        (solver, n, *_evaluate(net, data, solver, n))
        for solver, n in tqdm(plans, desc="convergence", leave=False, disable=None if progress else True)
    ]
    (_, _, reference, labels, _), *rest = found
    errors = {(s, n): float((z - reference).norm() / reference.norm()) for s, n, z, _, _ in rest}
    return ConvergenceTable(
        len(labels),
        reference_steps,
        _accuracy(reference, labels),
        float(F.cross_entropy(reference, labels)),
        tuple((block.solver, block.grid_steps) for block in blocks),
        tuple(
            Evaluation(
                solver,
                n,
                nfe,
                _accuracy(logits, labels),
                float(F.cross_entropy(logits, labels)),
                errors[solver, n],
                _order(errors, solver, n),
            )
            for solver, n, logits, _, nfe in rest
        ),
    )


def _order(errors: Mapping[tuple[str, int], float], solver: str, steps: int) -> float | None:
    """log2 of the error at half the steps over the error at ``steps``."""
    coarse, fine = errors.get((solver, steps // 2)), errors[solver, steps]
    if steps % 2 or not coarse or not fine:
        return None
    return math.log2(coarse / fine)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _evaluate(
    net: nn.Module, data: Sequence[tuple[Tensor, Tensor]], solver: str, steps: int
) -> tuple[Tensor, Tensor, int]:
    """All logits and labels, and the evaluations of f in one forward pass."""
    if not data:
        raise InvalidInput("convergence needs data to evaluate the net on, and there is none")
    with evaluating(net), solver_settings(net, solver=solver, steps=steps, compile_mode=None):
        logits = torch.cat([net(x) for x, _ in data])
        nfe = sum(block.stats.nfe_forward for block in net.modules() if isinstance(block, ODEBlock))
    return logits, torch.cat([labels for _, labels in data]), nfe
