"""A data set in memory: three splits on one device, standardized batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.data.augment import Augment, check_generator
from resode.data.splits import Split
from resode.errors import InvalidInput, choose, positive

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three splits on one device, and the moments of the training inputs.

    Args:
        name: as given to `load`.
        train, validation, test: disjoint; the validation split may be empty.
        classes: the number of classes; labels are 0 … classes − 1.
        mean, std: (C,) float32, over the training examples and their pixels, of images scaled to [0, 1] or of
            points as they are. The standard deviation is the population's, and 1 for a constant channel.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        """Channels of an image, or coordinates of a point."""
        return self.train.inputs.shape[1]

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the images; None for points."""
        return None if self.train.inputs.dim() == 2 else tuple(self.train.inputs.shape[2:])

    def standardize(self, inputs: Tensor) -> Tensor:
        """(x − mean) / std in each channel, as float32, with uint8 scaled to [0, 1] first.

        Inputs of another type are taken to be on the scale of ``mean`` already.

        Raises:
            InvalidInput: unless ``inputs`` have the channels and the dimensions of this set.
        """
        if inputs.dim() != self.train.inputs.dim() or inputs.shape[1] != self.channels:
            expected = f"(N, {self.channels}" + (")" if self.size is None else ", H, W)")
            raise InvalidInput(
                f"inputs of shape {tuple(inputs.shape)} are not those of {self.name}: expected {expected}"
            )
        scaled = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
        mean, std = (
            moment.to(inputs.device).reshape(-1, *[1] * (inputs.dim() - 2)) for moment in (self.mean, self.std)
        )
        return (scaled - mean) / std

    def batches(
        self,
        split: str | Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        drop_last: bool = False,
        repeats: int = 1,
        epoch: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a split, as (standardized float32 inputs, labels).

        Where the augmentation mixes examples, the shares of the classes, float32 (B, K), come in place of the labels.

        With a generator the examples are shuffled, without one they come in their order. This call alone
        advances the generator, and by the same whatever the settings: the augmentation draws from one of its own,
        seeded by it. So runs with and without augmentation see the same orders, and a pass that is broken off
        changes nothing that follows.

        Args:
            split: "train", "validation" or "test", or a split made by hand.
            batch_size: examples in a batch; the last may have fewer, unless ``drop_last`` leaves it out.
            generator: on the CPU.
            augment: changes the inputs before they are standardized, and mixes them afterwards. Needs a generator.
            drop_last: only full batches.
            repeats: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335): each batch has batch_size/repeats
                examples, so many times each, every time augmented by itself. There are as many batches as without, so a
                pass sees one example in ``repeats``, drawn anew each time (as Wightman et al. 2021, arXiv 2110.00476).
                Needs a generator.
            epoch: the number of the pass, from 0 on: for the alternating flip, which mirrors repeats alike.

        Raises:
            InvalidInput: for an unknown split, a batch size that is not a whole number above 0, a generator that
                is not on the CPU, an augmentation or repeats without one, repeats that do not divide the batch size, an
                alternating flip without the epoch, or ``drop_last`` of the only batch.
        """
        if isinstance(split, str):
            split = getattr(self, choose(split, _SPLITS, "split"))
        check_whole(batch_size, "batch_size")
        check_generator(generator)
        if augment and generator is None:
            raise InvalidInput("an augmentation was given without a generator: pass generator=torch.Generator()")
        if augment and augment.alternate_flip and epoch is None:
            raise InvalidInput("the alternating flip goes by the number of the epoch: pass epoch=0, 1, …")
        _check_repeats(repeats, batch_size, generator)
        if drop_last and 0 < len(split) < batch_size:
            raise InvalidInput(
                f"batch_size is {batch_size}, and drop_last leaves nothing of {len(split)} examples: lower it"
            )
        order = None if generator is None else torch.randperm(len(split), generator=generator)
        if order is not None and repeats > 1:
            order = order.repeat_interleave(repeats)  # of which the parts below take the beginning
        draws = None if generator is None else _derived(generator)
        stop = len(split) // batch_size * batch_size if drop_last else len(split)
        parts = [slice(start, min(start + batch_size, stop)) for start in range(0, stop, batch_size)]
        return self._pass(split, parts, order, augment, draws, epoch)

    def _pass(
        self,
        split: Split,
        parts: list[slice],
        order: Tensor | None,
        augment: Augment | None,
        generator: torch.Generator | None,
        epoch: int | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`batches`, once its arguments are checked and its order is drawn."""
        if order is not None:
            order = order.to(split.inputs.device)
        for part in parts:
            index = part if order is None else order[part]
            batch = split.take(index)
            inputs = augment(batch.inputs, generator, index=index, epoch=epoch) if augment else batch.inputs
            x, wanted = self.standardize(inputs), batch.labels
            if augment and augment.mixes:
                x, wanted = augment.mix(x, wanted, self.classes, generator)
            yield x, wanted


class Batches:
    """Batches of a split, in its order, that can be gone through any number of times.

    A split that comes class by class, as an image folder's, is gone through with each class spread evenly over it: the
    first ones and every batch are then of all classes, each with its share.

    Args:
        data: the set.
        split: "train", "validation" or "test".
        batch_size: examples in a batch; the last may have fewer.
        limit: that many examples, evenly spaced over the split; all if None or more than there are.

    Raises:
        InvalidInput: for an unknown split, or a number that is not a whole one above 0.
    """

    def __init__(self, data: DataSet, split: str, batch_size: int, limit: int | None = None) -> None:
        check_whole(batch_size, "batch_size")
        if limit is not None:
            check_whole(limit, "limit")
        self.data, self.batch_size = data, batch_size
        self.split = getattr(data, choose(split, _SPLITS, "split"))
        if limit is not None and limit < len(self.split):
            places = torch.arange(limit, device=self.split.labels.device) * len(self.split) // limit
            self.split = self.split.take(places)
        if bool((self.split.labels.diff() >= 0).all()):
            self.split = self.split.take(_spread(self.split.labels))

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(self.split, self.batch_size)


def _spread(labels: Tensor) -> Tensor:
    """The places of ``labels`` (N,), which grow, in the order of the share of its class that each one ends."""
    first, end = torch.searchsorted(labels, labels), torch.searchsorted(labels, labels, right=True)
    rank = torch.arange(len(labels), device=labels.device) - first
    return torch.argsort((rank + 1) / (end - first), stable=True)


def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,) float32 each; see `DataSet`."""
    of = _grey_moments if inputs.dtype == torch.uint8 else _point_moments
    mean, std = (torch.stack(moment) for moment in zip(*(of(channel) for channel in inputs.unbind(1)), strict=True))
    return mean.float(), torch.where(std == 0, 1.0, std).float()


def _grey_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """From the histogram: exact, in a third of the time and an eighth of the memory of the pixels as float64."""
    count = torch.bincount(pixels.flatten(), minlength=256).double()
    level = torch.arange(256, dtype=torch.float64)
    mean = (count * level).sum() / count.sum()
    variance = (count * (level - mean) ** 2).sum() / count.sum()
    return mean / 255, variance.sqrt() / 255


def _point_moments(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(coordinates.double(), correction=0)
    return mean, std


def check_whole(value: int, what: str) -> None:
    if not isinstance(value, int):
        raise InvalidInput(f"{what} is {value!r}: it must be a whole number above 0")
    positive(value, what)


def _check_repeats(repeats: int, batch_size: int, generator: torch.Generator | None) -> None:
    check_whole(repeats, "repeats")
    if batch_size % repeats:
        raise InvalidInput(
            f"repeats is {repeats}, and batch_size {batch_size} is no multiple of it: each batch has batch_size/"
            "repeats examples, repeats times each"
        )
    if repeats > 1 and generator is None:
        raise InvalidInput("repeats without a generator would show the first examples alone: pass generator=")


def _derived(generator: torch.Generator) -> torch.Generator:
    """A generator seeded by a draw from another."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
