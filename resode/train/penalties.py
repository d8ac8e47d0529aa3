"""What a training adds to the loss of its data, or to the optimizer's step: decay, L1, group sparsity."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.varying import drawn_values, varying_layers
from resode.errors import InvalidInput
from resode.layers.factors import factorized, factors_of
from resode.layers.fold import LINEAR_MAPS
from resode.layers.norm import LayerNorm


def decaying(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights in ``model`` that decay, by name, each once.

    The others are parameters of fewer than two dimensions (biases, scales and shifts of norms, single numbers such as
    SkipInit's), and the scale and shift of a layer norm of any. Of one that varies with t, the dimensions at one t
    count. Decaying a norm's scale acts on nothing but the step size of what stands before it.
    """
    of_norms = {p for layer in model.modules() if isinstance(layer, _NORMS) for p in layer.parameters()}
    stacked = drawn_values(model)
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim - (p in stacked) > 1 and p not in of_norms
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights, which decay (see :func:`decaying`), and the rest, which do not."""
    weights = list(decaying(model).values())
    held = set(weights)
    rest = [p for p in model.parameters() if p.requires_grad and p not in held]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


_NORMS = (LayerNorm, nn.LayerNorm)
"""The norms whose scale and shift may have more dimensions than one."""


@dataclass(frozen=True)
class Penalties:
    """Weights of the penalties that make a net sparse, in its loss.

    Args:
        l1: of Σ |w|, over the weights that decay: single weights become 0.
        group: of Σ_g √|g| ‖w_g‖₂, over the filters of convolutions and the units of linear layers: whole filters do.

    Raises:
        InvalidInput: for a number that is negative or not finite.
    """

    l1: float = 0.0
    group: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "group"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"penalty {name} is {getattr(self, name)}: a number of at least 0 is expected")


def penalty(model: nn.Module, settings: Penalties) -> Tensor | None:
    """l1·Σ |w| + group·Σ_g √|g| ‖w_g‖₂ of ``model``, a number to add to its loss; None if ``settings`` ask for none.

    The second is the group lasso in the form of Scardapane et al. 2017 (arXiv 1607.00485), which take all
    weights that leave a unit for a group; here a group is what makes one output, as the filters of Wen et al. 2016
    (arXiv 1608.03665): see :func:`filters`. Neither counts biases and norms. At w = 0, where they have a kink, their
    gradients are 0. Weights that are products (see ``train.sparsity``) count as the products they are.

    Raises:
        InvalidInput: for a model without weights.
    """
    if settings.l1 == 0.0 and settings.group == 0.0:
        return None
    parts: list[Tensor] = []
    if settings.l1:
        parts += [settings.l1 * weight.abs().sum() for weight in _weights(model)]
    if settings.group:
        for rows in filters(model).values():
            parts.append(settings.group * math.sqrt(rows.shape[1]) * torch.linalg.vector_norm(rows, dim=1).sum())
    if not parts:
        raise InvalidInput("the model has no weight that requires a gradient: there is nothing to penalize")
    return torch.stack([part.float() if part.dtype.itemsize < 4 else part for part in parts]).sum()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that decay; in the place of two factors, their product."""
    products = {factor: place for place in factorized(model) for factor in factors_of(*place)}
    made = set()
    for parameter in decaying(model).values():
        place = products.get(parameter)
        if place is None:
            yield parameter
        elif place not in made:
            made.add(place)
            yield getattr(*place)


def filters(model: nn.Module) -> dict[str, Tensor]:
    """The weights that make single outputs of ``model``'s convolutions and linear layers: by layer, (groups, |g|).

    A row has all the weights of one filter or unit, those of a time channel included, and no bias. Where weights vary
    with t, it is what is 0 when the filter is: on a basis of pieces or knots, each of these has filters of its own,
    as each of so many residual blocks has; on the Fourier basis all coefficients of a filter are one row. Layers that
    share a weight count once, and frozen ones not at all.
    """
    bases = {layer: layers.basis for layers in varying_layers(model) for layer in layers.modules()}
    products = set(factorized(model))
    found, seen = {}, set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LINEAR_MAPS):
            continue
        tensors = []
        for own in ("weight", "time_weight"):
            held = factors_of(layer, own)[0] if (layer, own) in products else getattr(layer, own, None)
            if held is not None and held.requires_grad and held not in seen:
                seen.add(held)
                tensors.append(getattr(layer, own))
        if not tensors:
            continue
        basis = bases.get(layer)
        if basis is None:
            rows = [t.flatten(1) for t in tensors]
        elif basis.kind == "fourier":
            rows = [t.transpose(0, 1).flatten(1) for t in tensors]
        else:
            rows = [t.flatten(2).flatten(0, 1) for t in tensors]
        found[name] = torch.cat(rows, 1)
    return found


@dataclass(frozen=True)
class Zeroed:
    """How many of ``count`` filters are zero."""

    zero: int
    count: int


@torch.no_grad()
def zeroed_filters(model: nn.Module, threshold: float) -> dict[str, Zeroed]:
    """What group sparsity did: by layer, how many of its :func:`filters` are zero.

    Args:
        threshold: a filter is taken for zero if the root mean square of its weights is at most this. Gradient descent
            does not reach the kink at 0: its steps, of a root mean square of lr·group by the penalty alone, go to and
            fro across it.

    Raises:
        InvalidInput: for a threshold below 0, or a model without convolutions and linear layers.
    """
    if not 0.0 <= threshold < math.inf:
        raise InvalidInput(f"threshold is {threshold}: a number of at least 0 is expected")
    found = {}
    for name, rows in filters(model).items():
        size = torch.linalg.vector_norm(rows, dim=1) / math.sqrt(rows.shape[1])
        found[name] = Zeroed(int((size <= threshold).sum()), len(rows))
    if not found:
        raise InvalidInput("the model has no convolution or linear layer with a weight that requires a gradient")
    return found
