"""The range of each setting, written once: for `Augment`, and for the functions that do the work."""

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from resode.errors import InvalidInput


@dataclass(frozen=True)
class Range:
    """The numbers from 0 to ``most``, or, with ``below``, those below it; of them the ``whole`` ones, or all.

    Whole numbers are Python's; the others may be NumPy's, or tensors without axes (as in a ``Recipe``).
    """

    what: str
    most: float = math.inf
    below: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not self.whole else value
        if not isinstance(number, int if self.whole else Real) or isinstance(number, bool):
            return False
        return 0 <= number < self.most or (number == self.most < math.inf and not self.below)


PIXELS = Range("a whole number of pixels", whole=True)
NUMBER = Range("a finite number")

RANGES = {
    "crop": PIXELS,
    "shift": PIXELS,
    "resized_crop": Range("a share of the area", 1),
    # By the whole side an image is out of its frame.
    "translate": Range("a share of the sides", 1, below=True),
    "shear": Range("an angle in degrees", 89),
    "rotate": Range("an angle in degrees", 180),
    "randaugment": Range("a whole number of operations", whole=True),
    "magnitude": Range("a whole number", 30, whole=True),
    "brightness": NUMBER,
    "contrast": NUMBER,
    "saturation": NUMBER,
    "hue": Range("a share of a full turn", 0.5),
    "cutout": PIXELS,
    "erase": Range("a probability", 1),
    "mixup": NUMBER,
    "cutmix": NUMBER,
}


def check_setting(name: str, value: object, what: str | None = None, *, off: bool = True) -> None:
    """Raise InvalidInput unless ``value`` is in the range of the setting.

    Args:
        name: of the setting.
        value: what it shall be.
        what: its name in the error; None for ``name``.
        off: whether 0, which turns most of them off, is allowed.
    """
    allowed = RANGES[name]
    if value in allowed and (off or value):
        return
    zero = "0" if name == "magnitude" else "0 (off)"
    span = (
        f"from {zero} to {'below ' * allowed.below}{allowed.most:g}" if allowed.most < math.inf else f"{zero} or more"
    )
    raise InvalidInput(f"{what or name} is {value!r}: it must be {allowed.what}, {span if off else 'above 0'}")
