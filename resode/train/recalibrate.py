"""Batch norm's statistics, computed anew for the weights that training ended with."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks.ode import solver_settings
from resode.errors import InvalidInput
from resode.nets.net import evaluating
from resode.train.frozen import is_frozen


def recalibrate(model: nn.Module, data: Iterable[Tensor | tuple[Tensor, ...]]) -> int:
    """Replace all running statistics of batch norms in ``model`` by averages over ``data``, usually a training set.

    Running statistics are a moving average over the last batches of a training, met by weights that still moved, with
    dropout active. Here the final weights meet all batches: batch norms normalize by the moments of the batch, as in
    training, and everything else (dropout, random ends) is in evaluation mode. The mean and the variance become the
    averages of those of the batches, each with the weight of its size, so that a smaller last batch counts as much as
    its samples do; with knots, at each knot. (The variance is that within a batch: a batch of n samples misses a share
    of about 1/n of the whole set's, if it is a random one. Shuffle data that come class by class: batches of one class
    miss all that the classes differ in.) ODE blocks are solved with the settings they have at the time: recalibrate
    again for another solver. Cf. Wu & Johnson 2021, arXiv 2105.07576, section 3 ("precise batch norm").

    Batches of one sample have no variance and are left out. Modes and momenta are restored; if anything fails, the
    statistics are, too. What no batch came by keeps its statistics, and so do frozen batch norms (``train.frozen``).

    Args:
        data: tensors x, or tuples that begin with one, such as (x, labels).

    Returns:
        How many batch norms were recalibrated.

    Raises:
        InvalidInput: when there is no batch of at least two samples.
    """
    layers = statistics(model)
    if not layers:
        return 0
    done = False
    with evaluating(model), solver_settings(model, compile_mode=None):
        averages = [_Average(layer) for layer in layers]
        try:
            done = _average(model, data, averages)
            if not done:
                raise InvalidInput("recalibration averages over batches of at least 2 samples, and there is none")
        finally:
            for average in averages:
                average.end(keep=done)
    return len(layers)


def statistics(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms in ``model`` whose running statistics can be replaced: those that have them, not frozen."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and not is_frozen(layer)]
    return [layer for layer in norms if layer.track_running_stats]


def _average(model: nn.Module, data: Iterable[Tensor | tuple[Tensor, ...]], averages: list["_Average"]) -> bool:
    """Go through ``data``; whether there was any."""
    found = False
    for batch in data:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if len(x) < 2:
            continue
        for average in averages:
            average.begin_batch(len(x))
        model(x)
        for average in averages:
            average.end_batch(len(x))
        found = True
    return found


@dataclass
class _Average:
    """The averages that ``layer`` is gathering.

    Without a momentum an update has the share 1/N, where N counts the updates, this one included. Set to S/n before a
    batch of n samples, with S the samples before it, the count makes the share n/(S + n): the average by samples. This
    holds for several updates in one batch (a layer used more than once), and for each knot by itself.
    """

    layer: _BatchNorm

    def __post_init__(self) -> None:
        layer = self.layer
        self.momentum, self.tracked = layer.momentum, layer.num_batches_tracked
        self.held = [buffer.clone() for buffer in (layer.running_mean, layer.running_var, self.tracked)]
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None
        self.samples = torch.zeros_like(self.tracked, dtype=layer.running_mean.dtype)

    def begin_batch(self, count: int) -> None:
        self.layer.num_batches_tracked = self.samples / count

    def end_batch(self, count: int) -> None:
        updates = (self.layer.num_batches_tracked - self.samples / count).round()
        self.samples += updates * count
        self.tracked += updates.to(self.tracked.dtype)

    def end(self, keep: bool) -> None:
        """Restore the momentum, and the statistics that were not met; all of them, unless ``keep``."""
        layer, (mean, variance, batches) = self.layer, self.held
        layer.momentum = self.momentum
        met = (self.samples > 0) & keep
        layer.num_batches_tracked = self.tracked.copy_(torch.where(met, self.tracked, batches))
        met = met.unsqueeze(-1) if mean.ndim > 1 else met
        layer.running_mean.copy_(torch.where(met, layer.running_mean, mean))
        layer.running_var.copy_(torch.where(met, layer.running_var, variance))
