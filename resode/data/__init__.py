"""The data: sets as tensors on one device, their splits, and random augmentation."""

from resode.data.augment import Augment, random_crop, random_flip, random_shift
from resode.data.dataset import DataSet
from resode.data.sets import NAMES, check_name, load
from resode.data.splits import Split

__all__ = [
    "NAMES",
    "Augment",
    "DataSet",
    "Split",
    "check_name",
    "load",
    "random_crop",
    "random_flip",
    "random_shift",
]
