"""Random augmentation of image batches.

Every transformation maps images (B, C, H, W), uint8 or floating in [0, 1], to images of the same shape, type and
device, drawing for each image on its own. The draws are made on the CPU and only then moved to the images' device, so
that one generator gives the same images on any device.

Augmentation comes *before* standardization, so what enters from outside the frame is black (0): the usual order
of torchvision's transforms, and the background of handwritten digits. He et al. 2016 do not say which they did;
fb.resnet.torch standardizes first, which makes its padding the mean colour. The mixing of examples comes after it,
which changes nothing but the rounding: standardization is affine.
"""

from resode.data.augment.augmented import Augmented
from resode.data.augment.color import color_jitter
from resode.data.augment.draws import check_generator
from resode.data.augment.erasing import cutout, random_erasing
from resode.data.augment.flips import alternating_flip, random_flip
from resode.data.augment.geometry import affine, random_affine
from resode.data.augment.mix import Mix, cutmix, mixup
from resode.data.augment.policy import randaugment
from resode.data.augment.resized_crop import random_resized_crop
from resode.data.augment.settings import Augment
from resode.data.augment.shifts import random_crop, random_shift

__all__ = [
    "Augment",
    "Augmented",
    "Mix",
    "affine",
    "alternating_flip",
    "check_generator",
    "color_jitter",
    "cutmix",
    "cutout",
    "mixup",
    "randaugment",
    "random_affine",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "random_shift",
]
