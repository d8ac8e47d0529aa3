"""A part of a data set, and the two things done to its labels: holding some out, and drawing some anew."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resode.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and their labels, both on one device.

    Args:
        inputs: images, uint8 (N, C, H, W), or points, float32 (N, 2).
        labels: int64 (N,).

    Raises:
        InvalidInput: for another shape or type, or unequal numbers.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if (self.inputs.dtype, self.inputs.dim()) not in {(torch.uint8, 4), (torch.float32, 2)}:
            raise InvalidInput(
                f"inputs are {self.inputs.dtype} of shape {tuple(self.inputs.shape)}: "
                "expected images, uint8 (N, C, H, W), or points, float32 (N, 2)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.inputs.shape[:1]:
            raise InvalidInput(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}: "
                f"expected int64 of shape ({len(self.inputs)},), one for each input"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "Split":
        """The examples at ``index``, in its order."""
        return Split(self.inputs[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Split":
        """The same on another device."""
        return Split(self.inputs.to(device), self.labels.to(device))


def hold_out(split: Split, fraction: float, generator: torch.Generator | None = None) -> tuple[Split, Split]:
    """Split in two, stratified: (what is kept, what is held out).

    With the examples in order of class, shuffled within each by the ``generator`` (in their own order without
    one), those are held out where ⌊i·fraction + ½⌋ grows, i = 0 … N. So ⌊fraction·N + ½⌋ are held out in all, and
    of a class of n examples ⌊fraction·n⌋ or ⌈fraction·n⌉.

    Raises:
        InvalidInput: if a fraction above 0 holds out nothing, or everything.
    """
    order = torch.arange(len(split)) if generator is None else torch.randperm(len(split), generator=generator)
    order = order[split.labels[order].argsort(stable=True)]
    # The marks are whole numbers, never fall, and rise by one at most, as fraction < 1: float64 counts exactly.
    marks = torch.floor(torch.arange(len(split) + 1, dtype=torch.float64) * fraction + 0.5)
    out = marks.diff() > 0
    if fraction > 0 and (out.all() or not out.any()):
        raise InvalidInput(
            f"holding out {fraction:g} of {len(split)} examples leaves one part empty: "
            "use more data, or another fraction (0 holds out nothing)"
        )
    # Back into the order of the file, which the cut says nothing about.
    return split.take(order[~out].sort().values), split.take(order[out].sort().values)


def redraw_labels(split: Split, fraction: float, classes: int, generator: torch.Generator) -> Split:
    """Draw round(fraction·N) of the labels anew, uniformly over the classes (Zhang et al. 2017: partial corruption).

    A new label is the old one with probability 1/classes. Under one generator a larger fraction makes all the
    changes that a smaller one makes.
    """
    if fraction == 0:
        return split
    chosen = torch.randperm(len(split), generator=generator)[: round(fraction * len(split))]
    drawn = torch.randint(classes, (len(split),), generator=generator)
    labels = split.labels.clone()
    labels[chosen] = drawn[chosen]
    return replace(split, labels=labels)
