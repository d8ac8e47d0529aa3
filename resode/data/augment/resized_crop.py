"""A random part of each image, stretched to the size of the whole."""

import math

import torch
from torch import Tensor

from resode.data.augment.draws import below, check_images, uniform
from resode.data.augment.ranges import check_setting
from resode.data.augment.resample import precision, resample

RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def random_resized_crop(images: Tensor, least: float, generator: torch.Generator | None = None) -> Tensor:
    """Crop a part of each image and stretch it bilinearly to the old size (Szegedy et al. 2015, section 6).

    The part has a share of the area from U(least, 1) and a ratio of width to height from exp U(log 3/4, log 4/3), and
    lies anywhere in the frame. Of ten such draws the first that fits is taken; if none does, the middle of the image,
    as large as the ratios allow. This is ``torchvision.transforms.RandomResizedCrop``.

    Args:
        images: (B, C, H, W).
        least: the smallest share of the area.

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), ``least`` is not in [0, 1], or ``generator`` is not on the CPU.
    """
    check_images(images)
    check_setting("resized_crop", least, "the least share of random_resized_crop")
    height, width = images.shape[2:]
    area = height * width * uniform(least, 1.0, (TRIES, len(images)), generator)
    ratio = uniform(math.log(RATIOS[0]), math.log(RATIOS[1]), (TRIES, len(images)), generator).exp()
    tall, wide = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first = fits.int().argmax(0, keepdim=True)
    tall, wide = tall.gather(0, first)[0], wide.gather(0, first)[0]
    top, left = below(height - tall + 1, generator), below(width - wide + 1, generator)
    middle_tall, middle_wide = _middle(height, width)
    middle = (middle_tall, middle_wide, (height - middle_tall) // 2, (width - middle_wide) // 2)
    box = (torch.where(fits.any(0), a, b) for a, b in zip((tall, wide, top, left), middle, strict=True))
    return resized_crop(images, *box)


def resized_crop(images: Tensor, tall: Tensor, wide: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The part of each image with ``tall`` rows from ``top`` and ``wide`` columns from ``left``, (B,) each and on the
    CPU, stretched bilinearly to the size of the whole.

    Pixel i of the H reads row top + (i + ½)·tall/H − ½, or the nearest that is inside the part.
    """
    height, width = images.shape[2:]
    places = _places(height, tall, top), _places(width, wide, left)
    y, x = (place.to(images.device, precision(images)) for place in places)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    return resample(images, grid)


def smallest_part(size: tuple[int, int], least: float) -> tuple[int, int]:
    """The fewest rows and the fewest columns of a part, of images of this size (H, W); not at the same time."""
    # √(area·3/4): the rows of the widest part, and the columns of the tallest one.
    drawn = max(1, round(math.sqrt(least * math.prod(size) * RATIOS[0])))
    rows, columns = (min(drawn, middle) for middle in _middle(*size))
    return rows, columns


def _places(side: int, length: Tensor, start: Tensor) -> Tensor:
    """(B, side): where along an axis the pixels of the result are read, the frame being [−1, 1]."""
    length, start = length.double()[:, None], start.double()[:, None]
    place = start + (torch.arange(side, dtype=torch.float64) + 0.5) * length / side - 0.5
    return (2 * place.clamp(start, start + length - 1) + 1) / side - 1


def _middle(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the largest part with a ratio that is allowed."""
    if width / height < RATIOS[0]:
        return round(width / RATIOS[0]), width
    if width / height > RATIOS[1]:
        return height, round(height * RATIOS[1])
    return height, width
