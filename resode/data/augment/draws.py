"""Random draws for each image of a batch, and the checks of what is augmented.

Every draw is made on the CPU, and only what was drawn is moved to the images' device: one generator gives the same
augmentation on every device. How many numbers are drawn follows from the settings and from the shape and type of the
batch, never from its pixels, with two exceptions that follow from what was drawn before: random erasing draws noise for
the images that it erases alone, and where a batch goes to MixUp or CutMix a coin decides which of them draws.
"""

import torch
from torch import Tensor

from resode.errors import InvalidInput


def draw(choices: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of 0 … choices − 1 for each image, (B,) int64 on the images' device."""
    check_generator(generator)
    return torch.randint(choices, (len(images),), generator=generator).to(images.device)


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform on [low, high), of this shape, float64, on the CPU."""
    check_generator(generator)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def below(bounds: Tensor, generator: torch.Generator | None) -> Tensor:
    """For each whole number n of ``bounds`` one of 0 … n − 1, int64 on the CPU; at n ≤ 1 it is 0."""
    fraction = uniform(0.0, 1.0, tuple(bounds.shape), generator)
    return torch.minimum((fraction * bounds).long(), bounds - 1).clamp(min=0)


def check_generator(generator: torch.Generator | None) -> None:
    """Raise InvalidInput unless the generator is None or on the CPU.

    A CPU generator draws the same numbers on every machine; a GPU's draws others.
    """
    if generator is not None and generator.device.type != "cpu":
        raise InvalidInput(f"the generator is on {generator.device}: pass one on the CPU, torch.Generator()")


def check_images(images: Tensor) -> None:
    """Raise InvalidInput unless these are images (B, C, H, W), uint8 or floating."""
    if images.dim() != 4:
        raise InvalidInput(
            f"cannot augment inputs of shape {tuple(images.shape)}: expected images (B, C, H, W); "
            "for points turn the augmentation off, Augment()"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InvalidInput(f"cannot augment images of type {images.dtype}: expected uint8, or floating in [0, 1]")


def check_colors(images: Tensor, what: str) -> None:
    """Raise InvalidInput unless these are images of 1 channel (grey) or 3 (red, green, blue)."""
    check_images(images)
    if images.shape[1] not in (1, 3):
        raise InvalidInput(
            f"{what} is defined for images of 1 channel (grey) or 3 (RGB), and these have {images.shape[1]}: "
            "turn it off for such data"
        )
