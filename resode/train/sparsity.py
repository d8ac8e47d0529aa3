"""Sparse weights: by products of factors that decay, and by pruning.

**Factors.** Written as w = a ⊙ b, with ½κ(‖a‖² + ‖b‖²) added to the loss, weights become those that minimize the loss
plus κ‖w‖₁: by the inequality of the means ½(a² + b²) ≥ |ab|, with equality at |a| = |b|, and every local minimum of the
one is a local minimum of the other (Ziyin & Wang 2022, "spred", arXiv 2210.01212). But the penalty of a and b is
smooth, so that gradient descent converges to zeros, where it goes to and fro across the kink of |w|. For sgd and adam,
whose weight decay is part of the gradient, κ is their ``weight_decay``; see ``layers.factors``. By the decay alone sgd
makes a factor smaller by e^(−κ Σ lr/(1 − momentum)), so that κ times this sum over the steps must be well above 1.

**Pruning** sets the smallest weights to 0, all in one order of magnitude (Han et al. 2015, arXiv 1506.02626), as many
as an accuracy permits. A factor that gradient descent drives to 0 decreases geometrically and never is 0: after a
training with factors, pruning at no loss of accuracy removes what is left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resode.errors import InvalidInput
from resode.layers.factors import Factors, Place, factorized, multiply_out
from resode.train.metrics import evaluate
from resode.train.penalties import decaying

__all__ = ["Pruned", "as_factors", "factorize", "multiply_out", "prune_to_sparse"]


def factorize(model: nn.Module) -> None:
    """Write each weight of ``model`` that decays as a product of two factors, in place; the weights stay as they are.

    An optimizer must be made afterwards: both factors are among the weights that decay.

    Raises:
        InvalidInput: when weights are factorized already or parametrized otherwise, are shared by several layers (what
            stands in one place as a layer may stand in many), or when there are none.
    """
    if factorized(model):
        raise InvalidInput("the weights of the model are products of factors already: call multiply_out(model) first")
    for layer, name in _places(model):
        parametrize.register_parametrization(layer, name, Factors(tuple(layer._parameters)))


@contextmanager
def as_factors(model: nn.Module) -> Iterator[None]:
    """``model`` with products of factors as its weights: :func:`factorize`, and at the end :func:`multiply_out`.

    Raises:
        InvalidInput: as :func:`factorize`.
    """
    factorize(model)
    try:
        yield
    finally:
        multiply_out(model)


def _places(model: nn.Module) -> list[Place]:
    """Where the weights that decay stand."""
    names = {parameter: name for name, parameter in decaying(model).items()}
    places: dict[nn.Parameter, Place] = {}
    for layer in model.modules():
        for own, parameter in layer._parameters.items():
            if parameter not in names:
                continue
            if isinstance(layer, parametrize.ParametrizationList) or parametrize.is_parametrized(layer):
                raise InvalidInput(f"the layer of {names[parameter]} is parametrized: remove that to use factors")
            if parameter in places:
                raise InvalidInput(
                    f"several layers share {names[parameter]}, and would no longer with factors: share the layer"
                )
            places[parameter] = (layer, own)
    if not places:
        raise InvalidInput("the model has no weight that requires a gradient and decays: there is nothing to factorize")
    return list(places.values())


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_to_sparse` did.

    Args:
        threshold: the largest magnitude that was set to 0.
        accuracy_before, accuracy_after: on the data given.
        sparsity: share of the weights that are 0, in [0, 1].
        weights: their number.
        layers: the share by the name of the weight.
    """

    threshold: float
    accuracy_before: float
    accuracy_after: float
    sparsity: float
    weights: int
    layers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


SHARES = tuple(2.0 ** (-k / 2) for k in range(2, 25))
"""Shares of the weights to keep that are looked at first, from the smallest, 1/4096, to 1/2."""
ROUNDING = 1e-12
"""By which two shares of right answers may miss a tolerance that they meet."""


@torch.no_grad()
def prune_to_sparse(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], *, tolerance: float = 0.0, mirrored: bool = False
) -> Pruned:
    """Set to 0, in place, the weights of ``model`` up to the largest magnitude that the accuracy on ``data`` permits.

    Accuracy does not fall steadily with the threshold, and there are too many thresholds to look at all. So of none,
    those shares of the weights in ``SHARES``, and all, the smallest share is found that can be kept with an accuracy of
    no more than ``tolerance`` below that before; and from there, by bisection, a threshold that passes, where the next
    magnitude does not. Biases, norms and single numbers are left alone. Products of factors are multiplied out first.

    Args:
        data: pairs (x, labels), held while they are evaluated again and again: a validation split, never the test data
            that the net is to be judged by.
        tolerance: accuracy that may be lost, in [0, 1).
        mirrored: the accuracy is that of images and their mirror images (see ``metrics.evaluate``).

    Raises:
        InvalidInput: for a tolerance outside [0, 1), no data, or a model without weights.
    """
    if not 0.0 <= tolerance < 1.0:
        raise InvalidInput(f"tolerance is {tolerance}: an accuracy in [0, 1) that may be lost is expected")
    data = list(data)
    multiply_out(model)
    weights = decaying(model)
    if not weights:
        raise InvalidInput("the model has no weight that requires a gradient and decays: there is nothing to prune")
    before = evaluate(model, data, mirrored=mirrored).accuracy
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    magnitudes, counts = torch.cat([weight.abs().flatten() for weight in kept.values()]).unique(return_counts=True)
    thresholds = torch.cat([magnitudes.new_tensor([-1.0]), magnitudes])  # the first prunes nothing
    gone = torch.cat([counts.new_zeros(1), counts.cumsum(0)]) / counts.sum()

    def prune(index: int) -> float:
        """The accuracy without the weights up to threshold ``index``, which are 0 from here on."""
        for name, weight in weights.items():
            weight.copy_(torch.where(kept[name].abs() > thresholds[index], kept[name], 0.0))
        return evaluate(model, data, mirrored=mirrored).accuracy

    looked_at = [len(magnitudes), *(int(torch.searchsorted(gone, 1.0 - share)) for share in reversed(SHARES)), 0]
    try:
        index = _largest(lambda index: prune(index) >= before - tolerance - ROUNDING, looked_at)
        after = prune(index)
    except BaseException:
        for name, weight in weights.items():
            weight.copy_(kept[name])
        raise
    zeros = {name: int((weight == 0.0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return Pruned(
        threshold=max(float(thresholds[index]), 0.0),
        accuracy_before=before,
        accuracy_after=after,
        sparsity=sum(zeros.values()) / total,
        weights=total,
        layers={name: zeros[name] / weight.numel() for name, weight in weights.items()},
    )


def _largest(passes: Callable[[int], bool], looked_at: Sequence[int]) -> int:
    """The first of the falling indices ``looked_at`` that passes (the last does), moved up towards the one before."""
    failed = None
    for index in looked_at:
        if index == 0 or passes(index):
            break
        failed = index
    while failed is not None and failed - index > 1:
        middle = (index + failed) // 2
        if passes(middle):
            index = middle
        else:
            failed = middle
    return index
