"""RandAugment: N operations for each image, drawn from fourteen, all of the same magnitude.

At magnitude M of 0 … 30 the operations do what they do in ``torchvision.transforms.RandAugment``, whose functions
they are:

============ =============================================== ============ ==========================================
Identity     nothing                                         AutoContrast each channel stretched to the full range
Equalize     a flat histogram for each channel               Solarize     values from 255·(1 − M/30) on are inverted
Rotate       by ± M degrees                                  Posterize    to 8 − round(2M/15) bits
ShearX, Y    by ± 0.3·M/30 pixels a pixel                    Color        saturation × (1 ± 0.9·M/30)
TranslateX,Y by ± 150/331·M/30 of the side, in whole pixels  Contrast     × (1 ± 0.9·M/30)
Brightness   × (1 ± 0.9·M/30)                                Sharpness    × (1 ± 0.9·M/30)
============ =============================================== ============ ==========================================

The signs are random; black comes in from outside, and pixels go to the nearest. On grey images (one channel) Color does
nothing, and AutoContrast and Equalize act on that channel. Floating images are taken to be in [0, 1]; Equalize reads
them in 256 levels. Other numbers of channels are refused, as torchvision does.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from resode.data.augment.draws import check_colors, uniform
from resode.data.augment.ranges import RANGES, check_setting

BINS = int(RANGES["magnitude"].most) + 1

SIGNED = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
)  # fmt: skip
UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = SIGNED + UNSIGNED


def randaugment(images: Tensor, number: int, magnitude: int, generator: torch.Generator | None = None) -> Tensor:
    """Do ``number`` operations to each image, drawn for each with repetition (Cubuk et al. 2020, arXiv 1909.13719).

    The policy is taken as it was published, what its operations do together included: three translations the same way
    by a third of the side or more (from M = 23 on; one image in thousands at N = 3) move an image out of its frame, and
    changes of brightness and of bits, one after the other, can make a dark image black.

    Images with the same draw go through an operation together, so that a batch takes at most 22 calls each time.

    Args:
        images: (B, 1 or 3, H, W).
        number: N, operations for each image.
        magnitude: M, from 0 to 30.

    Raises:
        InvalidInput: for other images, another number or magnitude, or if ``generator`` is not on the CPU.
    """
    check_colors(images, "RandAugment")
    check_setting("randaugment", number, "the number of operations of RandAugment")
    check_setting("magnitude", magnitude)
    images = images.clone()
    for _ in range(number):
        drawn = uniform(0.0, 1.0, (2, len(images)), generator)
        kind = (drawn[0] * len(OPERATIONS)).long()
        negative = (drawn[1] < 0.5) & (kind < len(SIGNED))
        for group in (2 * kind + negative).unique().tolist():
            name, sign = OPERATIONS[group // 2], -1 if group % 2 else 1
            place = (2 * kind + negative == group).nonzero().flatten().to(images.device)
            images[place] = operate(images[place], name, sign * strength(name, magnitude, tuple(images.shape[2:])))
    return images


def strength(name: str, magnitude: int, size: tuple[int, int]) -> float:
    """What magnitude M means for an operation on images of this size (H, W), without its sign."""
    share, (height, width) = magnitude / (BINS - 1), size
    match name:
        case "ShearX" | "ShearY":
            return 0.3 * share
        case "TranslateX":
            return 150 / 331 * share * width
        case "TranslateY":
            return 150 / 331 * share * height
        case "Rotate":
            return 30 * share
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return 0.9 * share
        case "Posterize":
            return 8 - round(4 * share)
        case "Solarize":
            return 255 * (1 - share)
        case _:
            return 0.0


def operate(images: Tensor, name: str, strength: float) -> Tensor:
    """Do one operation to all images (B, 1 or 3, H, W), with a signed strength in the units of :func:`strength`."""
    return _functions()[name](images, strength)


@cache
def _functions() -> Mapping[str, Callable[[Tensor, float], Tensor]]:
    """The operations by name."""
    import torchvision.transforms.v2.functional as vision  # here, because it takes a second that others need not wait

    def affine(images: Tensor, shift: tuple[int, int], shear: tuple[float, float]) -> Tensor:
        # A shear keeps the upper left corner where it is, as in AutoAugment (Cubuk et al. 2019).
        centre = [0.0, 0.0] if any(shear) else None
        return vision.affine(images, 0.0, list(shift), 1.0, list(shear), center=centre)

    return {
        "Identity": lambda x, m: x,
        "ShearX": lambda x, m: affine(x, (0, 0), (math.degrees(math.atan(m)), 0.0)),
        "ShearY": lambda x, m: affine(x, (0, 0), (0.0, math.degrees(math.atan(m)))),
        "TranslateX": lambda x, m: affine(x, (int(m), 0), (0.0, 0.0)),
        "TranslateY": lambda x, m: affine(x, (0, int(m)), (0.0, 0.0)),
        "Rotate": vision.rotate,
        "Brightness": lambda x, m: vision.adjust_brightness(x, 1 + m),
        "Color": lambda x, m: vision.adjust_saturation(x, 1 + m),
        "Contrast": lambda x, m: vision.adjust_contrast(x, 1 + m),
        "Sharpness": lambda x, m: vision.adjust_sharpness(x, 1 + m),
        "Posterize": lambda x, m: vision.posterize(x, int(m)),
        "Solarize": lambda x, m: vision.solarize(x, m if x.dtype == torch.uint8 else m / 255),
        "AutoContrast": lambda x, m: vision.autocontrast(x),
        "Equalize": lambda x, m: vision.equalize(x),
    }
