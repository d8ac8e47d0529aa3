"""MixUp and CutMix: each example of a batch mixed with another one, in its image and in its label.

The other one is given by a random permutation of the batch, so that an example may meet itself. λ is the same for the
whole batch, drawn from Beta(α, α), on the CPU as everything is.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resode.data.augment.boxes import inside
from resode.data.augment.draws import check_generator, check_images
from resode.data.augment.ranges import check_setting
from resode.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Mix:
    """How the examples of one batch are mixed.

    Args:
        share: λ, the share of an example's own label.
        partner: int64 (B,), the example that each is mixed with.
        box: (rows, columns, top, left) of the part that comes from the partner; None to average the images.
    """

    share: float
    partner: Tensor
    box: tuple[int, int, int, int] | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """λ·x + (1 − λ)·x[partner]; or x with the partner's pixels in the box. uint8 is rounded."""
        other = x[self.partner.to(x.device)]
        if self.box is not None:
            tall, wide, top, left = self.box
            return torch.where(inside(x[:1], tall, wide, torch.tensor([top]), torch.tensor([left])), other, x)
        if x.dtype == torch.uint8:
            return self.inputs(x.float()).round().to(torch.uint8)
        return self.share * x + (1 - self.share) * other

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """The shares of the classes, float32 (B, classes): λ·onehot(y) + (1 − λ)·onehot(y[partner]), y int64 (B,).

        Raises:
            InvalidInput: for labels on the CPU that are not in 0 … classes − 1; on CUDA the kernel stops at them.
        """
        _check_classes(labels, classes)
        own = F.one_hot(labels, classes).float()
        return self.share * own + (1 - self.share) * own[self.partner.to(labels.device)]


def mixup(x: Tensor, alpha: float, generator: torch.Generator | None = None) -> Mix:
    """A draw of MixUp (Zhang et al. 2018, arXiv 1710.09412, equation 1) for inputs (B, …): images, or points.

    x̃ = λ·x_i + (1 − λ)·x_j,  ỹ = λ·y_i + (1 − λ)·y_j,  λ ~ Beta(α, α)

    Raises:
        InvalidInput: unless α is finite and above 0, or if ``generator`` is not on the CPU.
    """
    check_setting("mixup", alpha, "alpha of MixUp", off=False)
    return Mix(_beta(alpha, generator), _permutation(x, generator))


def cutmix(x: Tensor, alpha: float, generator: torch.Generator | None = None) -> Mix:
    """A draw of CutMix (Yun et al. 2019, arXiv 1905.04899, equations 1 and 2) for images (B, C, H, W).

    A box of ⌊H√(1 − λ)⌋ × ⌊W√(1 − λ)⌋ pixels, λ ~ Beta(α, α), with its centre anywhere in the frame, comes from the
    partner. Where the box reaches beyond the border it is clipped, and λ is set to the share of the area that is kept.

    Raises:
        InvalidInput: if ``x`` is not (B, C, H, W), α is not finite and above 0, or ``generator`` is not on the CPU.
    """
    check_images(x)
    check_setting("cutmix", alpha, "alpha of CutMix", off=False)
    side = math.sqrt(1 - _beta(alpha, generator))
    lengths, starts = [], []
    for frame in x.shape[2:]:
        length = int(frame * side)
        start = int(torch.randint(frame, (), generator=generator)) - length // 2
        stop = min(start + length, frame)
        starts.append(max(start, 0))
        lengths.append(stop - starts[-1])
    kept = 1 - math.prod(lengths) / math.prod(x.shape[2:])
    return Mix(kept, _permutation(x, generator), (*lengths, *starts))


def check_labels(x: Tensor, labels: Tensor) -> None:
    """Raise InvalidInput unless there is one label, int64, for each of the inputs."""
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise InvalidInput(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: to mix inputs of shape {tuple(x.shape)} "
            f"int64 of shape ({len(x)},) is expected"
        )


def _check_classes(labels: Tensor, classes: int) -> None:
    """Raise InvalidInput unless the labels, where they are on the CPU, are in 0 … classes − 1."""
    # To read a GPU's labels the CPU would have to wait for it at every step. On CUDA torch's one_hot relies on its
    # scatter, whose assertion on the device stops the process at such a label: late and terse, but not silent.
    if labels.device.type != "cpu" or not len(labels):
        return
    least, most = (int(label) for label in labels.aminmax())
    if least < 0 or most >= classes:
        raise InvalidInput(
            f"labels go from {least} to {most}, and there are {classes} classes: labels must lie in 0 … {classes - 1}; "
            "count the classes from 0, or give the net an output for each"
        )


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    """λ ~ Beta(α, α); torch's own takes no generator, so its NumPy twin is seeded by one."""
    check_generator(generator)
    return float(np.random.default_rng(int(torch.randint(2**62, (), generator=generator))).beta(alpha, alpha))


def _permutation(x: Tensor, generator: torch.Generator | None) -> Tensor:
    check_generator(generator)
    return torch.randperm(len(x), generator=generator)
