"""Mirroring left to right: at random, or by turns."""

import torch
from torch import Tensor

from resode.data.augment.draws import check_images, draw
from resode.errors import InvalidInput


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2 (Krizhevsky et al. 2012, section 4.1).

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), or ``generator`` is not on the CPU.
    """
    check_images(images)
    return _mirror(images, draw(2, images, generator).bool())


def alternating_flip(images: Tensor, index: Tensor | None, epoch: int | None) -> Tensor:
    """Mirror each image in every other epoch; a coin for each image says whether in the first, 0 (Jordan 2024,
    arXiv 2404.00498, section 3.6).

    So two epochs in a row show every image and every mirror image once, where independent coins show half of the images
    twice the same way. The coin of image i is the parity of a hash of i, the same in all trainings, so that nothing is
    drawn and nothing has to be kept.

    Args:
        images: (B, C, H, W).
        index: int64 (B,), which image of the data set each is.
        epoch: the number of the epoch, from 0 on.

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), or ``index`` or ``epoch`` is not such.
    """
    check_images(images)
    if not isinstance(epoch, int) or epoch < 0:
        raise InvalidInput(f"epoch is {epoch!r}: the alternating flip goes by its number, a whole one from 0 on")
    if index is None or index.shape != images.shape[:1] or index.dtype != torch.int64:
        given = None if index is None else f"{index.dtype} of shape {tuple(index.shape)}"
        raise InvalidInput(
            f"index is {given}: the alternating flip needs the place of each image in its data set, int64 of shape "
            f"({len(images)},)"
        )
    return _mirror(images, ((_hash(index.to(images.device)) + epoch) % 2).bool())


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def _hash(key: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby 2008; 32 bits), of numbers from 0 on, in int64.

    Products overflow, but the 32 bits that count are right modulo 2³².
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        key = (key ^ (key >> shift)) * factor & 0xFFFFFFFF
    return key ^ (key >> 16)
