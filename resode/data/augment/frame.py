"""What is sure to be left of an image in its frame."""

import math

from torch import Tensor

from resode.data.augment.draws import check_images
from resode.data.augment.resized_crop import smallest_part
from resode.errors import InvalidInput


def check_frame(
    images: Tensor,
    *,
    crop: int = 0,
    shift: int = 0,
    resized_crop: float = 0.0,
    translate: float = 0.0,
    shear: float = 0.0,
    rotate: float = 0.0,
    cutout: int = 0,
) -> None:
    """Raise InvalidInput if these settings of `Augment`, one after the other, can leave an image all black.

    On a side of H pixels, with d = crop + shift, which the crop of a part of h pixels magnifies to d·H/h, and with
    t = round(translate·H), H − d·H/h − t pixels of an image are left at worst. There must be some on each side, and the
    square of cutout must not cover them on both. An image that is turned or sheared between the two displacements must
    keep its middle. Without resized_crop, shear and rotate this refuses only what can go wrong; with them, a bit more.

    What RandAugment does is not counted, nor the noise of random erasing: see there.

    Args:
        images: (B, C, H, W).

    Raises:
        InvalidInput: if they can, or ``images`` is not (B, C, H, W).
    """
    check_images(images)
    size = height, width = tuple(images.shape[2:])
    first = crop + shift
    part = smallest_part(size, resized_crop) if first and resized_crop else size
    before = [first * side / length if first else 0 for side, length in zip(size, part, strict=True)]
    after = [round(float(translate * side)) for side in size]
    if shear or rotate:
        left = _left_of_turned(size, before, after, shear)
        rule = "the middle of an image stays in the frame"
    else:
        left = [math.ceil(side - d - t) for side, d, t in zip(size, before, after, strict=True)]
        rule = "the displacements add up to less than a side"
    named = {"crop": crop, "shift": shift, "resized_crop": resized_crop}
    named |= {"translate": translate, "shear": shear, "rotate": rotate}
    moves = ", ".join(f"{name} {value:g}" for name, value in named.items() if value)
    if min(left) < 1:
        magnified = " (resized_crop magnifies those before it: a larger part does so less)" if part != size else ""
        raise InvalidInput(
            f"{moves} can leave nothing of images of {height} × {width}: choose less, so that {rule}{magnified}"
        )
    if cutout >= max(left):
        after_all = f", of which {moves} may leave {left[0]} × {left[1]}" if moves else ""
        raise InvalidInput(
            f"a cutout of {cutout} × {cutout} can blacken images of {height} × {width}{after_all}: choose a side of at "
            f"most {max(left) - 1} pixels"
        )


def _left_of_turned(size: tuple[int, ...], before: list[float], after: list[int], shear: float) -> list[int]:
    """How many rows and columns are sure to show an image that is moved, turned or sheared, and moved again; or 0.

    Before the turn a disc about the middle of the frame shows the image. A turn keeps it; a shear makes an ellipse of
    it, with a disc inside whose radius is less by the smaller singular value of the shear, (√(4 + k²) − k)/2 with k its
    tangent. This disc is seen if its centre, moved by whole pixels, is in the frame, and the pixel nearest to that in
    the disc; and a disc of diameter 2r is seen in at least ⌊2r⌋ − 1 rows.
    """
    slope = math.tan(math.radians(shear))
    radius = min(side / 2 - d for side, d in zip(size, before, strict=True)) * (math.sqrt(4 + slope**2) - slope) / 2
    # The middle is that of a pixel where a side is odd, and half a pixel beside it where it is even.
    nearest = math.hypot(*((1 - side % 2) / 2 for side in size))
    if radius <= nearest or any(2 * t >= side for side, t in zip(size, after, strict=True)):
        return [0, 0]
    return [max(1, math.floor(min(2 * radius, side / 2 + radius - t)) - 1) for side, t in zip(size, after, strict=True)]
