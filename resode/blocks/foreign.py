"""Layers of others inside a branch: which break the contract of a solve, and how to put ours in their place."""

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops import StochasticDepth

from resode.errors import InvalidInput
from resode.layers.dropout import Dropout
from resode.layers.norm import BatchNorm


def refuse_foreign(branch: nn.Module) -> None:
    """Check that ``branch`` holds no layer that draws at random, or updates statistics, at each evaluation.

    Inside one solve a branch must be a function of (t, h) alone. torch's own dropout draws a new mask at every stage of
    a step, and torch's batch norm updates its buffers at every stage and again in a recomputation.

    Raises:
        InvalidInput: naming the first such layer, where it is, and what to do.
    """
    for name, layer in branch.named_modules():
        reason = _objection(layer)
        if reason:
            where = f"branch.{name}" if name else "the branch"
            owner = type(layer).__module__.split(".")[0]
            raise InvalidInput(
                f"{where} is {owner}'s {type(layer).__name__}, which {reason}: no solver is "
                "right with it inside an ODE block; resode.convert(branch) puts ours in its place"
            )


def _objection(layer: nn.Module) -> str | None:
    if isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNorm):
        return "updates its running statistics at every evaluation"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "updates its running statistics at every evaluation"
    if isinstance(layer, (_DropoutNd, StochasticDepth, nn.RReLU)):
        return "draws at random at every evaluation"
    return None


def convert(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with our batch norm and dropout in the place of torch's, weights and statistics kept.

    Raises:
        InvalidInput: for a layer that has no counterpart here (alpha dropout, RReLU, an instance norm with running
            statistics).
    """
    if _objection(module):
        return _counterpart(module)
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        if _objection(layer):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, _counterpart(layer))
    return module


def _counterpart(layer: nn.Module) -> nn.Module:
    for kind, make in _COUNTERPARTS:
        if isinstance(layer, kind):
            return make(layer).train(layer.training)
    raise InvalidInput(
        f"{type(layer).__name__} has no counterpart that is fixed within a solve: use one of resode.layers instead"
    )


def _batch_norm(layer: _BatchNorm) -> BatchNorm:
    ours = BatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    held = next(iter([*layer.parameters(), *layer.buffers()]), None)
    if held is not None:
        ours = ours.to(held.device, held.dtype)
    ours.load_state_dict(layer.state_dict())
    return ours


_COUNTERPARTS: list[tuple[type | tuple[type, ...], Callable[[nn.Module], nn.Module]]] = [
    (_BatchNorm, _batch_norm),
    ((nn.Dropout2d, nn.Dropout3d, nn.Dropout1d), lambda layer: Dropout(layer.p, "spatial")),
    (nn.Dropout, lambda layer: Dropout(layer.p, "unit")),
    (StochasticDepth, lambda layer: Dropout(layer.p, "path" if layer.mode == "row" else "unit")),
]
