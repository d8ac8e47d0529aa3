"""Translation by whole pixels, with black coming in: what a crop of the padded image is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.data.augment.draws import check_images, draw
from resode.data.augment.frame import check_frame
from resode.data.augment.ranges import check_setting


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
        InvalidInput: if ``images`` is not (B, C, H, W), ``pixels`` is no whole number from 0 on or can move an image
            out of its frame, or ``generator`` is not on the CPU.
    """
    check_images(images)
    check_setting("shift", pixels, "the crop or shift")
    check_frame(images, shift=pixels)
    height, width = images.shape[2:]
    top, left = (draw(2 * pixels + 1, images, generator) for _ in "yx")
    # All the crops there are, as a view: indexing it copies only those drawn.
    crops = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, top, left]
