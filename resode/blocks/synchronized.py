"""Batch norm over several processes, in training one model in all of them (DistributedDataParallel)."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks.solvers import Solve
from resode.errors import InvalidInput
from resode.layers.norm import BatchNorm
from resode.layers.synchronized import Processes


def synchronize(model: nn.Module, group: Any = None) -> int:
    """Let every batch norm in ``model`` take the moments of a batch over all processes of ``group``, in training.

    Each process calls it on its copy of the model, before wrapping that in ``DistributedDataParallel``. Outputs,
    gradients and running statistics are then those of one process with the whole batch, for residual and ODE blocks in
    every gradient mode, on any device (``torch.nn.SyncBatchNorm`` is for GPUs, and knows no solves). ODE blocks need
    solvers with equal steps: one that chooses them by the error of its own share of the batch would take other numbers
    of steps in each process, and wait for ever.

    Args:
        group: a group of ``torch.distributed``; all processes if None.

    Returns:
        How many batch norms there are.

    Raises:
        InvalidInput: when ``torch.distributed`` is not initialized, or for a batch norm that is not ours.
    """
    processes = Processes(group)
    processes.count()
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        if not isinstance(layer, BatchNorm):
            raise InvalidInput(
                f"{name or 'the model'} is torch's {type(layer).__name__}: put ours in its place with "
                "resode.convert(model) first, or use torch.nn.SyncBatchNorm.convert_sync_batchnorm (on GPUs)"
            )
    for _, layer in layers:
        layer.processes = processes
    return len(layers)


def refuse_synchronized(branch: nn.Module) -> None:
    """Check that no batch norm in ``branch`` would exchange moments in a solve that chooses its steps.

    Raises:
        InvalidInput: when one would.
    """
    for layer in branch.modules():
        if isinstance(layer, BatchNorm) and layer.processes is not None and layer.training and not layer.frozen:
            raise InvalidInput(
                "synchronized batch norm in an ODE block that chooses its steps: each process would choose others, and "
                "wait for the rest for ever; give the solver a number of steps (steps=8), or use another norm"
            )


def common_scale(f: Solve, scale: Tensor) -> Tensor:
    """``scale``, the size of this process's cotangent, or one for all processes between which cotangents will pass.

    A backward pass that normalizes its cotangent has to divide by the same number in all of them, since the cotangents
    of common moments are sums over the processes. The sum of their scales is such a number.
    """
    for layer in f.branch.modules() if isinstance(f.branch, nn.Module) else ():
        if isinstance(layer, BatchNorm) and layer.is_spread() and f.context.is_training(layer) and not layer.frozen:
            return layer.processes.sum(scale)
    return scale
