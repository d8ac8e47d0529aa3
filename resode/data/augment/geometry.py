"""Rotation, shear and translation of each image, in one resampling."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.data.augment.draws import check_images, uniform
from resode.data.augment.frame import check_frame
from resode.data.augment.ranges import check_setting
from resode.data.augment.resample import precision, resample
from resode.errors import choose

INTERPOLATIONS = ("nearest", "bilinear")


def affine(images: Tensor, angle: Tensor, shear: Tensor, shift: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Shear each image along its rows, rotate it about its centre, then translate it; black comes in.

    With places p = (x, y) in pixels from the centre of the image, y downwards,

        out(p) = in(A⁻¹(p − shift)),   A = [cos α, −sin α; sin α, cos α] · [1, −tan s; 0, 1]

    as ``torchvision.transforms.functional.affine`` does for one angle α and shear s.

    Args:
        images: (B, C, H, W).
        angle: α, (B,) in degrees, clockwise, on the CPU as the two others.
        shear: s, (B,) in degrees.
        shift: (B, 2), to the right and down, in pixels.
        interpolation: nearest or bilinear.

    Raises:
        InvalidInput: if ``images`` is not (B, C, H, W), or for another interpolation.
    """
    check_images(images)
    choose(interpolation, INTERPOLATIONS, "interpolation")
    if not len(images):
        return images
    height, width = images.shape[2:]
    angle, tangent = angle.double().deg2rad(), shear.double().deg2rad().tan()
    cos, sin = angle.cos(), angle.sin()
    # det A = 1.
    inverse = torch.stack([cos - sin * tangent, cos * tangent + sin, -sin, cos], dim=1).view(-1, 2, 2)
    back = -inverse @ shift.double().unsqueeze(2)
    # From pixels to the units of the grid, in which both sides of the frame have length 2.
    half = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    theta = torch.cat([inverse * half / half[:, None], back / half[:, None]], dim=2)
    theta = theta.to(images.device, precision(images))
    return resample(images, F.affine_grid(theta, list(images.shape), align_corners=False), interpolation)


def random_affine(
    images: Tensor,
    *,
    translate: float = 0.0,
    shear: float = 0.0,
    rotate: float = 0.0,
    interpolation: str = "bilinear",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rotate, shear and translate each image at random: ``torchvision.transforms.RandomAffine``, image by image.

    Args:
        images: (B, C, H, W).
        translate: by whole pixels, up to this share of the sides: round(U(−translate·W, translate·W)), and so for H;
            below 1.
        shear: along the rows, by an angle from U(−shear, shear), degrees, at most 89.
        rotate: by an angle from U(−rotate, rotate), degrees, at most 180.

    Raises:
        InvalidInput: as :func:`affine`, for a number out of its range, for numbers that can move an image out of its
            frame, or if ``generator`` is not on the CPU.
    """
    check_images(images)
    asked = {"translate": translate, "shear": shear, "rotate": rotate}
    for name, value in asked.items():
        check_setting(name, value)
    check_frame(images, **asked)
    n, height, width = len(images), *images.shape[2:]
    drawn = uniform(-1.0, 1.0, (n, 4), generator)
    reach = torch.tensor([translate * width, translate * height], dtype=torch.float64)
    return affine(images, rotate * drawn[:, 0], shear * drawn[:, 1], (reach * drawn[:, 2:]).round(), interpolation)
