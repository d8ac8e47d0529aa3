"""Parts of an image blotted out: a black square (cutout), or a rectangle of noise (random erasing)."""

import torch
from torch import Tensor

from resode.data.augment.boxes import inside
from resode.data.augment.draws import below, check_images, draw, uniform
from resode.data.augment.frame import check_frame
from resode.data.augment.ranges import check_setting

SHARES = (0.02, 0.4)
RATIOS = (0.3, 1 / 0.3)
TRIES = 10


def cutout(images: Tensor, side: int, generator: torch.Generator | None = None) -> Tensor:
    """Blacken a square of ``side`` pixels in each image (DeVries & Taylor 2017, arXiv 1708.04552, section 3.2).

    Its centre is a pixel (i, j) drawn uniformly from all, also near the border, where part of the square falls outside:
    the authors found that this matters. It covers the rows i − ⌊side/2⌋ … i − ⌊side/2⌋ + side − 1, and the columns so.
    (The authors fill standardized images with 0, which is the mean colour; here images are not yet standardized, and
    black is what enters from outside the frame, too.)

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), ``side`` is no whole number of pixels or can blacken a whole
            image (the longer side of the images, or more), or ``generator`` is not on the CPU.
    """
    check_images(images)
    check_setting("cutout", side, "the side of cutout")
    check_frame(images, cutout=side)
    top, left = (draw(length, images, generator) - side // 2 for length in images.shape[2:])
    return images.masked_fill(inside(images, side, side, top, left), 0)


def random_erasing(images: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """With probability p replace a rectangle of an image by noise (Zhong et al. 2020, arXiv 1708.04896, algorithm 1).

    The rectangle has a share of the area from U(0.02, 0.4) and a ratio of height to width from U(0.3, 1/0.3), the
    numbers of the paper, and each of its values is uniform on 0 … 255, or on [0, 1) for floating images. It is drawn
    until it is smaller than the image on both sides (so something of the image stays); where ten draws are not (images
    that are very long), the image is left as it is. Its place is uniform among those where it fits, as in torchvision;
    the paper draws the size anew, too, where it does not fit its place, so that large rectangles are rarer there.

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), ``p`` is no probability, or ``generator`` is not on the CPU.
    """
    check_images(images)
    check_setting("erase", p, "p of random erasing")
    n, height, width = len(images), *images.shape[2:]
    erased = uniform(0.0, 1.0, (n,), generator) < p
    area = height * width * uniform(*SHARES, (TRIES, n), generator)
    ratio = uniform(*RATIOS, (TRIES, n), generator)
    tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(0, keepdim=True)
    tall, wide = tall.gather(0, first)[0], wide.gather(0, first)[0]
    top, left = below(height - tall + 1, generator), below(width - wide + 1, generator)
    chosen = (erased & fits.any(0)).nonzero().flatten()
    noise = _noise(images, len(chosen), generator)
    images, place = images.clone(), chosen.to(images.device)
    box = inside(images[place], tall[chosen], wide[chosen], top[chosen], left[chosen])
    images[place] = torch.where(box, noise, images[place])
    return images


def _noise(images: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """As many images of noise, made on the CPU."""
    shape = (number, *images.shape[1:])
    if images.dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(images.device)
    return torch.rand(shape, generator=generator).to(images)
