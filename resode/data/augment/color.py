"""Colour jitter: brightness, contrast, saturation and hue, by a factor of its own for each image.

The formulas are torchvision's (``torchvision.transforms.v2.functional.adjust_*``), which take one factor a batch. With
grey(x) = 0.2989 R + 0.587 G + 0.114 B, and x itself for an image of one channel,

=========== ==================================================
brightness  f·x
contrast    f·x + (1 − f)·mean of grey(x) over the image
saturation  f·x + (1 − f)·grey(x)
hue         the hue turned by f of a full turn, f in [−½, ½]
=========== ==================================================

clipped to the range of the type, [0, 1] or 0 … 255. Saturation and hue leave a grey image as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from resode.data.augment.draws import check_colors, uniform
from resode.data.augment.ranges import check_setting
from resode.data.augment.resample import precision

GREY = (0.2989, 0.587, 0.114)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """f·x; images (B, 1 or 3, H, W), f (B,)."""
    return _blend(images, torch.zeros((), device=images.device), factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """f·x + (1 − f)·mean(grey(x))."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """f·x + (1 − f)·grey(x)."""
    return images if images.shape[1] == 1 else _blend(images, _grey(images), factor)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue, in full turns: 1/3 takes red to green, green to blue and blue to red."""
    if images.shape[1] == 1:
        return images
    top = 255 if images.dtype == torch.uint8 else 1
    hue, saturation, value = _hue_saturation_value(images.to(precision(images)) / top)
    hue = hue + turn.to(hue)[:, None, None]
    out = _red_green_blue(hue, saturation, value)
    # torchvision's way from [0, 1] to 0 … 255: 256 intervals of the same length.
    return (out * (256 - 1e-3) if top == 255 else out).to(images.dtype)


ADJUSTMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def color_jitter(
    images: Tensor,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change the colours of each image at random, the four changes in an order that is random, too.

    As ``torchvision.transforms.ColorJitter``, image by image: the factors of brightness, contrast and saturation are
    uniform on [max(0, 1 − s), 1 + s], s the setting; the turn of the hue is uniform on [−s, s]. (So as s comes near to
    1 a brightness may come near to black, and a contrast to one grey: a few tenths are usual.)

    Raises:
        InvalidInput: unless ``images`` is (B, 1 or 3, H, W), brightness, contrast and saturation are finite and at
            least 0, hue is in [0, ½], and ``generator`` is on the CPU.
    """
    check_colors(images, "colour jitter")
    reach = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    for name, value in reach.items():
        check_setting(name, value)
    used = [name for name in reach if reach[name]]
    ranges = {name: (-reach[name], reach[name]) if name == "hue" else _around_one(reach[name]) for name in used}
    factors = {name: uniform(*ranges[name], (len(images),), generator) for name in used}
    # A random permutation for each image.
    order = uniform(0.0, 1.0, (len(images), len(used)), generator).argsort(dim=1)
    images = images.clone()
    for turn in range(len(used)):
        for number, name in enumerate(used):
            chosen = (order[:, turn] == number).nonzero().flatten()
            place = chosen.to(images.device)
            images[place] = ADJUSTMENTS[name](images[place], factors[name][chosen])
    return images


def _around_one(reach: float) -> tuple[float, float]:
    return max(0.0, 1.0 - reach), 1.0 + reach


def _grey(images: Tensor) -> Tensor:
    """(B, 1, H, W); of uint8 images a whole number."""
    wide = images.to(precision(images))
    if images.shape[1] == 1:
        return wide
    red, green, blue = (weight * channel for weight, channel in zip(GREY, wide.unbind(1), strict=True))
    grey = (red + green + blue).unsqueeze(1)
    return grey.floor() if images.dtype == torch.uint8 else grey


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """f·images + (1 − f)·other, clipped; what is left of a level of uint8 is cut off, as in torchvision."""
    wide = images.to(precision(images))
    share, rest = (f.to(wide)[:, None, None, None] for f in (factor, 1 - factor))
    return (share * wide + rest * other).clamp(0, 255 if images.dtype == torch.uint8 else 1).to(images.dtype)


def _hue_saturation_value(colors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of colours (B, 3, H, W) in [0, 1], (B, H, W) each; the hue in full turns, 0 where there is none."""
    red, green, blue = colors.unbind(1)
    low, value = colors.aminmax(dim=1)
    span = value - low
    by = torch.where(span == 0, 1, span)
    sixths = torch.where(
        value == red,
        (green - blue) / by,
        torch.where(value == green, 2 + (blue - red) / by, 4 + (red - green) / by),
    )
    return sixths / 6, span / torch.where(value == 0, 1, value), value


def _red_green_blue(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse: channel n is v − v·s·max(0, min(k, 4 − k, 1)), k = (n + 6·hue) mod 6, n = 5, 3, 1."""
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue).remainder(6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)
