"""The data: sets as tensors on one device, their splits, and random augmentation."""

from resode.data.augment import (
    Augment,
    Augmented,
    alternating_flip,
    color_jitter,
    cutmix,
    cutout,
    mixup,
    randaugment,
    random_affine,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
    random_shift,
)
from resode.data.dataset import DataSet
from resode.data.sets import NAMES, check_name, load
from resode.data.splits import Split

__all__ = [
    "NAMES",
    "Augment",
    "Augmented",
    "DataSet",
    "Split",
    "alternating_flip",
    "check_name",
    "color_jitter",
    "cutmix",
    "cutout",
    "load",
    "mixup",
    "randaugment",
    "random_affine",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "random_shift",
]
