"""Layers of others inside a branch: which break the contract of a solve, and how to put ours in their place."""

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torchvision.ops import DropBlock2d, StochasticDepth

from resode.errors import InvalidInput
from resode.layers.dropout import Dropout
from resode.layers.norm import BatchNorm
from resode.layers.synchronized import Processes


def refuse_foreign(branch: nn.Module) -> None:
    """Check that ``branch`` holds no layer that draws at random, or updates statistics, at each evaluation.

    Inside one solve a branch must be a function of (t, h) alone. torch's own dropout draws a new mask at every stage of
    a step, and torch's batch norm updates its buffers at every stage and again in a recomputation. Only modules can be
    seen: a function called in the branch's own ``forward`` (``F.dropout``) cannot.

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


_RANDOM = (_DropoutNd, StochasticDepth, DropBlock2d, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def _objection(layer: nn.Module) -> str | None:
    if isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNorm):
        return "updates its running statistics at every evaluation"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "updates its running statistics at every evaluation"
    if isinstance(layer, _RANDOM) or is_drop_path(layer):
        return "draws at random at every evaluation"
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0:
        return "draws at random at every evaluation (it has dropout)"
    if any(isinstance(part, _SpectralNorm | SpectralNorm) for part in (layer, *layer._forward_pre_hooks.values())):
        return "changes its estimate of the weight's norm at every evaluation"
    return None


def is_drop_path(layer: nn.Module) -> bool:
    """Whether ``layer`` drops whole branches as timm's DropPath does: with the probability ``drop_prob``."""
    return type(layer).__name__ == "DropPath" and hasattr(layer, "drop_prob")  # timm's, and the copies of it


def convert(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with our batch norm and dropout in the place of torch's, weights and statistics kept.

    Raises:
        InvalidInput: for a layer that has no counterpart here (alpha dropout, RReLU, an instance norm with running
            statistics, an attention or recurrent layer with dropout, a spectral norm, …).
    """
    if _objection(module):
        return _counterpart(module)
    module = copy.deepcopy(module)
    ours: dict[nn.Module, nn.Module] = {}  # a layer that stands in several places stays one layer
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if _objection(layer):
            parent, _, child = name.rpartition(".")
            if layer not in ours:
                ours[layer] = _counterpart(layer)
            setattr(module.get_submodule(parent), child, ours[layer])
    return module


def _counterpart(layer: nn.Module) -> nn.Module:
    for fits, make in _COUNTERPARTS:
        if fits(layer):
            return make(layer).train(layer.training)
    raise InvalidInput(
        f"{type(layer).__name__} has no counterpart that is fixed within a solve: use one of resode.layers instead"
    )


def _batch_norm(layer: _BatchNorm) -> BatchNorm:
    ours = BatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    if isinstance(layer, nn.SyncBatchNorm):
        ours.processes = Processes(layer.process_group)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(ours, name, copy.deepcopy(getattr(layer, name)))
    return ours


_COUNTERPARTS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], nn.Module]]] = [
    (lambda layer: isinstance(layer, _BatchNorm), _batch_norm),
    (
        lambda layer: isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d),
        lambda layer: Dropout(layer.p, "spatial"),
    ),
    (lambda layer: isinstance(layer, nn.Dropout), lambda layer: Dropout(layer.p, "unit")),
    (
        # Its other mode drops the whole batch together, as nothing of ours does.
        lambda layer: isinstance(layer, StochasticDepth) and layer.mode == "row",
        lambda layer: Dropout(layer.p, "path"),
    ),
    (
        lambda layer: is_drop_path(layer) and getattr(layer, "scale_by_keep", True),
        lambda layer: Dropout(layer.drop_prob or 0.0, "path"),
    ),
]
