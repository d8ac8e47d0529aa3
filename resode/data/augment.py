"""Random augmentation of image batches: a mirror, a crop, a translation.

Every transformation maps images (B, C, H, W), uint8 or floating, to images of the same shape, type and device,
drawing for each image on its own. The draws are made on the CPU and only then moved to the images' device, so
that one generator gives the same images on any device.

Augmentation comes *before* standardization, so what enters from outside the frame is black (0): the usual order
of torchvision's transforms, and the background of handwritten digits. He et al. 2016 do not say which they did;
fb.resnet.torch standardizes first, which makes its padding the mean colour.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The settings of the augmentation, and the augmentation itself: mirror, then crop, then shift.

    ``Augment(flip=True, crop=4)`` is that of He et al. 2016, section 4.2, for CIFAR, after Krizhevsky et al.
    2012, section 4.1. ``bool(augment)`` says whether it does anything; if not, a call returns what it was given.

    Args:
        flip: mirror each image left to right with probability 1/2.
        crop: pad with this many black pixels on each side and crop the old size at a random place; 0 for none.
        shift: translate by up to this many pixels each way, with black beyond (the same as crop, and added to it).

    Raises:
        InvalidInput: for a ``crop`` or ``shift`` that is not a whole number from 0 on.
    """

    flip: bool = False
    crop: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        for name in ("crop", "shift"):
            _check_pixels(getattr(self, name), name)

    def __bool__(self) -> bool:
        return bool(self.flip or self.crop or self.shift)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``images`` (B, C, H, W) augmented; ``generator`` None means torch's default one.

        Raises:
            InvalidInput: for inputs that are not images, when there is anything to do to them.
        """
        if self.flip:
            images = random_flip(images, generator)
        if self.crop:
            images = random_crop(images, self.crop, generator)
        if self.shift:
            images = random_shift(images, self.shift, generator)
        return images


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2 (Krizhevsky et al. 2012, section 4.1).

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), or ``generator`` is not on the CPU.
    """
    _check_images(images)
    mirrored = _draw(2, images, generator).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Pad with ``padding`` zeros on every side, and crop the old size anywhere (He et al. 2016, section 4.2).

    The place is uniform over the (2·padding + 1)² there are. The crop at offset o of the padded image is the
    image translated by padding − o, so this *is* `random_shift`, under the name that the papers know.

    Raises:
        InvalidInput: as `random_shift`.
    """
    return random_shift(images, padding, generator)


def random_shift(images: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Translate each image by (dy, dx), uniform over {−pixels, …, pixels}², filling with zeros.

        out[b, c, i, j] = images[b, c, i − dy_b, j − dx_b],  0 outside the frame

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), ``pixels`` is negative or could move an image out of its
            frame, or ``generator`` is not on the CPU.
    """
    _check_images(images)
    _check_pixels(pixels, "the crop or shift")
    height, width = images.shape[2:]
    if pixels >= min(height, width):
        raise InvalidInput(
            f"a crop or shift of {pixels} pixels can leave nothing of images of {height} × {width}: "
            f"at most {min(height, width) - 1} is possible"
        )
    top, left = (_draw(2 * pixels + 1, images, generator) for _ in "yx")
    # All the crops there are, as a view: indexing it copies only those drawn.
    crops = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, top, left]


def check_generator(generator: torch.Generator | None) -> None:
    """Raise InvalidInput unless the generator is None or on the CPU.

    A CPU generator draws the same numbers on every machine; a GPU's draws others.
    """
    if generator is not None and generator.device.type != "cpu":
        raise InvalidInput(f"the generator is on {generator.device}: pass one on the CPU, torch.Generator()")


def _draw(choices: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of 0 … choices − 1 for each image, drawn on the CPU and moved to the images' device."""
    check_generator(generator)
    return torch.randint(choices, (len(images),), generator=generator).to(images.device)


def _check_images(images: Tensor) -> None:
    if images.dim() != 4:
        raise InvalidInput(
            f"cannot augment inputs of shape {tuple(images.shape)}: expected images (B, C, H, W); "
            "for points turn the augmentation off, Augment()"
        )


def _check_pixels(value: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"{what} is {value!r}: it must be a whole number of pixels, 0 (off) or more")
