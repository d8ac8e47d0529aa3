"""Augmentation as a module in front of a model, for training loops of one's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resode.data.augment.mix import check_labels
from resode.data.augment.settings import Augment
from resode.errors import InvalidInput


class Augmented(nn.Module):
    """A model with its augmentation: in training it augments its images, then standardizes them, then calls the model;
    in evaluation it only standardizes them.

    It draws from a generator of its own, so the augmentation is the same whatever the model draws, and the model draws
    the same with and without it. The generator is part of the ``state_dict``: a training resumed from it goes on with
    the draws that would have followed. A deep copy has a copy of the generator. It shares ``standardize`` where
    that is a function, and with it the data set that it may belong to; a module it copies, as it does the model.

    Args:
        model: from standardized images to logits (B, K).
        augment: the settings; ``alternate_flip`` is refused, as a module knows neither the epoch nor which images it
            sees (``DataSet.batches`` does).
        standardize: applied to the augmented images, ``DataSet.standardize`` for one; None leaves them as they are.
        seed: of the generator.

    Raises:
        InvalidInput: for ``alternate_flip``, or a seed that is not a whole number from 0 on.
    """

    def __init__(
        self,
        model: nn.Module,
        augment: Augment,
        *,
        standardize: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if augment.alternate_flip:
            raise InvalidInput(
                "alternate_flip needs the epoch and the place of each image in the data set, which a module does not "
                "know: use flip, or DataSet.batches(augment=..., epoch=...)"
            )
        if not isinstance(seed, int) or seed < 0:
            raise InvalidInput(f"seed is {seed!r}: it must be a whole number from 0 on")
        self.model, self.augment = model, augment
        self.standardize = standardize if isinstance(standardize, nn.Module) else _Shared(standardize)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The logits (B, K); with labels, int64 (B,), also what they should be: the labels, or, where examples were
        mixed, the shares of the classes, float32 (B, K).

        Raises:
            InvalidInput: without labels, or for labels that do not fit, where examples are mixed; and as ``augment``.
        """
        if not (self.training and self.augment):
            logits = self.model(self.standardize(x))
            return logits if labels is None else (logits, labels)
        if self.augment.mixes:
            if labels is None:
                raise InvalidInput("mixup and cutmix mix labels, too: call the model in training with (x, labels)")
            check_labels(x, labels)
        x = self.standardize(self.augment(x, self.generator))
        if not self.augment.mixes:
            logits = self.model(x)
            return logits if labels is None else (logits, labels)
        mix = self.augment.draw_mix(x, self.generator)
        logits = self.model(mix.inputs(x))
        return logits, mix.labels(labels, logits.shape[1])

    def get_extra_state(self) -> Tensor:
        """The state of the generator, for the ``state_dict``."""
        return self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        """Go on from a state of the generator."""
        self.generator.set_state(state.cpu())  # a checkpoint may have been loaded to another device


class _Shared:
    """A function, or None for the identity; a deep copy is itself, and copies no data set that it may belong to."""

    def __init__(self, function: Callable[[Tensor], Tensor] | None) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.function is None else self.function(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self
