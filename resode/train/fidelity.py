"""Whether the gradients that a training follows are those of its solves: the fidelity meter, in a session.

Of the gradient modes only ``adjoint`` is measured: the others differentiate the very solve that was made.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.blocks.fidelity import FIDELITY_TOLERANCE, gradient_fidelity
from resode.blocks.ode import ODEBlock, ode_blocks
from resode.blocks.settings import is_one_step
from resode.errors import SolverError
from resode.seeding import seeded

SAMPLES = 32
"""Samples on which gradients are compared: backpropagation through one block at a time must find room for them."""


def measure(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """The fidelity of each block of ``model`` whose gradient mode is the adjoint, by the block's name.

    A copy of the model, in training mode and float32, meets the batch (``x``, ``labels``), and each block its input
    there and the gradient of the cross-entropy by its output. Model and global random state are left as they were; the
    masks are always the same.

    Returns:
        For each block ``relative_error``, the largest of its parameters' and its input's, and whose it is
        (``parameter``), and ``reconstruction_error`` (see ``blocks.fidelity``); and ``failure``, what went wrong where
        they could not be measured, because the way back could not go on or the memory was not enough.
    """
    if not _adjoints(model):
        return {}
    with seeded(0, x.device), torch.enable_grad():
        twin = copy.deepcopy(model).train()
        try:
            met = _inputs_and_cotangents(twin, x, labels)
        except (SolverError, torch.OutOfMemoryError) as error:
            return {name: _failure(error) for name in _adjoints(twin)}
        return {name: _measure_block(block, *met[name]) for name, block in _adjoints(twin).items() if name in met}


def warning(found: Mapping[str, Mapping[str, Any]], what: str) -> str | None:
    """What to say of the measurements ``found`` of ``what``, as one sentence or two; None if all are well."""
    failed = [(name, one["failure"]) for name, one in found.items() if one.get("failure")]
    if failed:
        name, why = failed[0]
        return f"The gradient of {what} could not be compared with backpropagation in block {name}: {why}"
    errors = {name: _finite_or_inf(one["relative_error"]) for name, one in found.items()}
    name = max(errors, key=errors.__getitem__, default=None)
    if name is None or errors[name] <= FIDELITY_TOLERANCE:
        return None
    back = _finite_or_inf(found[name]["reconstruction_error"])
    return (
        f"The adjoint gradient of {what} is off by {errors[name]:.1%} from backpropagation ({found[name]['parameter']} "
        f"in block {name}; more than {FIDELITY_TOLERANCE:.0%} is too much), and its way back misses the start by "
        f"{back:.1%}. Use gradient=checkpoint (exact, and nearly as sparing of memory), "
        "more steps, or smaller tolerances."
    )


def _finite_or_inf(value: float | None) -> float:
    # What is not a finite number is None in JSON, and NaN is no larger than anything.
    return value if value is not None and math.isfinite(value) else math.inf


def _adjoints(model: nn.Module) -> dict[str, ODEBlock]:
    return {name: block for name, block in ode_blocks(model).items() if block.gradient == "adjoint"}


def _inputs_and_cotangents(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each adjoint block meets in a step of training: its input, and the gradient by its output."""
    met: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = _adjoints(model)
    hooks = [
        block.register_forward_hook(lambda _, inputs, out, name=name: met.update({name: (inputs[0].detach(), out)}))
        for name, block in blocks.items()
    ]
    modes = [(block.gradient, block.compile_mode) for block in blocks.values()]
    for block in blocks.values():  # exact gradients, at little memory
        block.gradient, block.compile_mode = "checkpoint" if is_one_step(block.solver) else "backprop", None
    loss = F.cross_entropy(model(x).float(), labels)
    cotangents = torch.autograd.grad(loss, [out for _, out in met.values()])
    for hook in hooks:
        hook.remove()
    for block, mode in zip(blocks.values(), modes, strict=True):
        block.gradient, block.compile_mode = mode
    return {name: (inputs, g) for (name, (inputs, _)), g in zip(met.items(), cotangents, strict=True)}


def _measure_block(block: ODEBlock, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    try:
        found = gradient_fidelity(block, x, cotangent)
    except (SolverError, torch.OutOfMemoryError) as error:
        return _failure(error)
    name, error = found.worst
    return {"parameter": name, "relative_error": error, "reconstruction_error": found.reconstruction_error}


def _failure(error: Exception) -> dict[str, Any]:
    return {"parameter": None, "relative_error": None, "reconstruction_error": None, "failure": str(error)}
