"""The settings of the augmentation, and the augmentation itself."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resode.data.augment.color import color_jitter
from resode.data.augment.draws import check_generator
from resode.data.augment.erasing import cutout, random_erasing
from resode.data.augment.flips import alternating_flip, random_flip
from resode.data.augment.frame import check_frame
from resode.data.augment.geometry import INTERPOLATIONS, random_affine
from resode.data.augment.mix import Mix, check_labels, cutmix, mixup
from resode.data.augment.policy import randaugment
from resode.data.augment.ranges import RANGES, check_setting
from resode.data.augment.resized_crop import random_resized_crop
from resode.data.augment.shifts import random_crop, random_shift
from resode.errors import InvalidInput, choose

# What can take an image out of its frame.
_PLACES = ("crop", "shift", "resized_crop", "translate", "shear", "rotate", "cutout")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of the training images, each one by itself, in the order of the settings. All are off by default.

    ``Augment(flip=True, crop=4)`` is that of He et al. 2016, section 4.2, for CIFAR, after Krizhevsky et al.
    2012, section 4.1. ``bool(augment)`` says whether it does anything; if not, a call returns what it was given.

    Args:
        flip: mirror each image left to right with probability 1/2.
        alternate_flip: mirror each image in every other epoch; not along with ``flip``.
        crop: pad with this many black pixels on each side and crop the old size at a random place; 0 for none.
        shift: translate by up to this many pixels each way, with black beyond (the same as crop, and added to it).
        resized_crop: crop a part with at least this share of the area and stretch it to the old size; 0 for none.
        translate: translate by up to this share of the width and of the height, below 1.
        shear: shear along the rows by up to this angle, in degrees.
        rotate: rotate by up to this angle, in degrees (with translate and shear, in one resampling).
        interpolation: of translate, shear and rotate: nearest or bilinear.
        randaugment: N of RandAugment: operations drawn from fourteen, for each image; 0 for none.
        magnitude: M of RandAugment, from 0 to 30.
        brightness: change of the brightness, by a factor in 1 ± this.
        contrast: change of the contrast, by a factor in 1 ± this.
        saturation: change of the saturation, by a factor in 1 ± this (not of grey images).
        hue: change of the hue, by up to this share of a full turn, at most 0.5 (not of grey images).
        cutout: blacken a square with this side, in pixels, somewhere in each image; a smaller one than the image.
        erase: probability of a rectangle of noise (random erasing).
        mixup: alpha of MixUp: an average of two images and of their labels, its share drawn from Beta(alpha, alpha).
        cutmix: alpha of CutMix: a box of one image in another (with mixup, one of the two for each batch).

    Raises:
        InvalidInput: for what is no number, or a number out of its range.
    """

    flip: bool = False
    alternate_flip: bool = False
    crop: int = 0
    shift: int = 0
    resized_crop: float = 0.0
    translate: float = 0.0
    shear: float = 0.0
    rotate: float = 0.0
    interpolation: Literal["nearest", "bilinear"] = "bilinear"
    randaugment: int = 0
    magnitude: int = 9
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    cutout: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in RANGES:
            check_setting(name, getattr(self, name))
        if self.flip and self.alternate_flip:
            raise InvalidInput("flip and alternate_flip are both on: mirror at random or by turns, and turn one off")
        choose(self.interpolation, INTERPOLATIONS, "interpolation")

    @property
    def mixes(self) -> bool:
        """Whether it mixes examples, and with them their labels."""
        return bool(self.mixup or self.cutmix)

    @property
    def _moves(self) -> bool:
        return bool(self.translate or self.shear or self.rotate)

    @property
    def _colors(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    def __bool__(self) -> bool:
        whole = self.flip or self.alternate_flip or self.crop or self.shift or self.randaugment or self.cutout
        return bool(whole or self.resized_crop or self._moves or self._colors or self.erase or self.mixes)

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        index: Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Return ``images`` (B, C, H, W) augmented, of the same shape, type and device, without mixing them.

        Args:
            images: uint8, or floating in [0, 1].
            generator: on the CPU; None means torch's default one.
            index, epoch: which images of the data set these are, int64 (B,), and the number of the epoch: for
                ``alternate_flip`` alone.

        Raises:
            InvalidInput: for inputs that are not images, when there is anything to do to them; for images so small
                that the settings together can leave nothing of one; or for a missing index or epoch.
        """
        places = {name: getattr(self, name) for name in _PLACES}
        if any(places.values()):
            check_frame(images, **places)
        if self.alternate_flip:
            images = alternating_flip(images, index, epoch)
        if self.flip:
            images = random_flip(images, generator)
        if self.crop:
            images = random_crop(images, self.crop, generator)
        if self.shift:
            images = random_shift(images, self.shift, generator)
        if self.resized_crop:
            images = random_resized_crop(images, self.resized_crop, generator)
        if self._moves:
            images = random_affine(
                images,
                translate=self.translate,
                shear=self.shear,
                rotate=self.rotate,
                interpolation=self.interpolation,
                generator=generator,
            )
        if self.randaugment:
            images = randaugment(images, self.randaugment, self.magnitude, generator)
        if self._colors:
            images = color_jitter(
                images,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
                hue=self.hue,
                generator=generator,
            )
        if self.cutout:
            images = cutout(images, self.cutout, generator)
        if self.erase:
            images = random_erasing(images, self.erase, generator)
        return images

    def mix(
        self, images: Tensor, labels: Tensor, classes: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the images (B, …) mixed, and the shares of the classes in them, float32 (B, classes).

        Where nothing is to be mixed the images are as they were, and the shares 0 and 1.

        Args:
            images: (B, C, H, W), standardized or not; for MixUp of any shape.
            labels: int64 (B,).
            generator: on the CPU; None means torch's default one.

        Raises:
            InvalidInput: for other labels, inputs that are no images for CutMix, or a generator not on the CPU.
        """
        check_labels(images, labels)
        mix = self.draw_mix(images, generator)
        return mix.inputs(images) if self.mixes else images, mix.labels(labels, classes)

    def draw_mix(self, images: Tensor, generator: torch.Generator | None = None) -> Mix:
        """How such images (B, …) are mixed this time; with both MixUp and CutMix each has probability 1/2.

        Raises:
            InvalidInput: as :meth:`mix`.
        """
        if not self.mixes:
            return Mix(1.0, torch.arange(len(images)))
        cut = bool(self.cutmix)
        if cut and self.mixup:
            check_generator(generator)
            cut = bool(torch.randint(2, (), generator=generator))
        return cutmix(images, self.cutmix, generator) if cut else mixup(images, self.mixup, generator)
