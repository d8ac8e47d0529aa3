"""Translation by whole pixels, with black coming in: what a crop of the padded image is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.data.augment.draws import check_images, draw
from resode.errors import InvalidInput


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
    check_images(images)
    check_pixels(pixels, "the crop or shift")
    height, width = images.shape[2:]
    if pixels >= min(height, width):
        raise InvalidInput(
            f"a crop or shift of {pixels} pixels can leave nothing of images of {height} × {width}: "
            f"at most {min(height, width) - 1} is possible"
        )
    top, left = (draw(2 * pixels + 1, images, generator) for _ in "yx")
    # All the crops there are, as a view: indexing it copies only those drawn.
    crops = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, top, left]


def check_pixels(value: int, what: str) -> None:
    """Raise InvalidInput unless ``value`` is a whole number of pixels, from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"{what} is {value!r}: it must be a whole number of pixels, 0 (off) or more")
