"""How smooth the loss is along its gradient, as Santurkar et al. 2018 measure it (arXiv 1805.11604, figure 4).

From the weights w and the gradient g = ∇L(w) of the loss of one batch, steps of several sizes η are tried:

========================  ==================================================  =======================================
range of the loss         min and max over η of L(w − ηg)                     figure 4a: how well g foretells the loss
change of the gradient    ‖∇L(w − ηg) − g‖                                    figure 4b: how well it foretells itself
effective β               max over η of ‖∇L(w − ηg) − g‖/(η‖g‖)               figure 4c: L is β-smooth along the step
========================  ==================================================  =======================================

For L = ½wᵀAw they are known: L(w − ηg) = L(w) − η‖g‖² + ½η²gᵀAg, the change is η‖Ag‖, and β = ‖Ag‖/‖g‖ at every η.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.errors import InvalidInput, positive
from resode.seeding import seed_default


@dataclass(frozen=True)
class Along:
    """What one batch finds along its gradient.

    Args:
        loss: L(w).
        gradient: ‖g‖.
        losses: L(w − ηg) for each η.
        changes: ‖∇L(w − ηg) − g‖ for each η.
    """

    loss: float
    gradient: float
    losses: tuple[float, ...]
    changes: tuple[float, ...]


@dataclass(frozen=True)
class Smoothness:
    """The smoothness of a loss along its gradients.

    Args:
        step_sizes: the η.
        batches: what each batch finds.
    """

    step_sizes: tuple[float, ...]
    batches: tuple[Along, ...]

    @property
    def loss_range(self) -> tuple[float, float]:
        """Least and largest loss over all η, each a mean over the batches."""
        return mean(min(b.losses) for b in self.batches), mean(max(b.losses) for b in self.batches)

    @property
    def gradient_range(self) -> tuple[float, float]:
        """Least and largest change of the gradient over all η, each a mean over the batches."""
        return mean(min(b.changes) for b in self.batches), mean(max(b.changes) for b in self.batches)

    @property
    def beta(self) -> float:
        """The effective β: the largest over all η, a mean over the batches (0 where the gradient is 0)."""
        return mean(max(self._ratios(b)) for b in self.batches)

    def _ratios(self, batch: Along) -> Iterator[float]:
        for eta, change in zip(self.step_sizes, batch.changes, strict=True):
            yield change / (eta * batch.gradient) if batch.gradient else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The measures, and what they are made of, as plain values."""
        measures = {"loss_range": self.loss_range, "gradient_range": self.gradient_range, "beta": self.beta}
        return {**asdict(self), **measures}


def smoothness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    step_sizes: Sequence[float],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Smoothness:
    """The smoothness of ``loss(model(x), y)`` along the gradients of batches, in training mode.

    Batch norm normalizes by the moments of the batch, which is the point of the measure. Dropout draws the same masks
    at every η, so that the loss is one function of the weights. Parameters, running statistics, modes, gradients held
    and the random state are afterwards as they were, also when something fails. Penalties of ODE blocks are no part of
    the loss.

    Args:
        batches: pairs (x, y), each looked at by itself, on the model's device.
        step_sizes: the η, at least one; learning rates of the training, for one.
        loss: of outputs and y, a scalar.

    Raises:
        InvalidInput: when there is no batch, no step size, one that is no finite number above 0, or no parameter that
            is trained.
    """
    etas = tuple(float(positive(eta, "step size")) for eta in step_sizes)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not etas or not weights:
        raise InvalidInput("smoothness needs at least one step size, and a model with parameters that are trained")
    with _restoring(model, weights) as begin:
        found = tuple(_along(model, begin, weights, batch, etas, loss) for batch in batches)
    if not found:
        raise InvalidInput("smoothness is measured on batches (x, y), and there is none")
    return Smoothness(etas, found)


def _along(
    model: nn.Module,
    begin: Callable[[], None],
    weights: list[Tensor],
    batch: tuple[Tensor, Tensor],
    etas: tuple[float, ...],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Along:
    """What ``batch`` finds.

    Args:
        begin: puts weights, statistics and random state to where they were.
    """

    def measured(eta: float, g: Sequence[Tensor] = ()) -> tuple[float, list[Tensor]]:
        begin()
        if eta:
            with torch.no_grad():
                torch._foreach_add_(weights, list(g), alpha=-eta)
        with torch.enable_grad():
            value = loss(model(batch[0]), batch[1])
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
        return float(value.detach()), [
            torch.zeros_like(w) if found is None else found for w, found in zip(weights, gradients, strict=True)
        ]

    at, g = measured(0.0)
    losses, changes = [], []
    for eta in etas:
        value, there = measured(eta, g)
        losses.append(value)
        changes.append(_norm([a - b for a, b in zip(there, g, strict=True)]))
    return Along(at, _norm(g), tuple(losses), tuple(changes))


def _norm(parts: Sequence[Tensor]) -> float:
    """The Euclidean norm of all ``parts`` as one vector."""
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in parts))


@contextmanager
def _restoring(model: nn.Module, weights: list[Tensor]) -> Iterator[Callable[[], None]]:
    """``model`` in training mode; a function that puts all that an evaluation changes to where it was."""
    held = [*weights, *model.buffers()]
    before = [tensor.detach().clone() for tensor in held]
    modes = {module: module.training for module in model.modules()}
    device, seed = weights[0].device, torch.initial_seed() % 2**63

    def begin() -> None:
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
        seed_default(seed, device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.train()
            yield begin
        finally:
            begin()
            for module, mode in modes.items():
                module.training = mode
