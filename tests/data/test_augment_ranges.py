"""The ranges of the settings: `Augment` and the functions that do the work refuse the same, and take the same."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from resode.data import (
    Augment,
    color_jitter,
    cutmix,
    cutout,
    mixup,
    randaugment,
    random_affine,
    random_crop,
    random_erasing,
    random_resized_crop,
    random_shift,
)
from resode.data.augment.ranges import RANGES
from resode.errors import InvalidInput

IMAGES = torch.randint(0, 256, (6, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def keyword(function, name):
    return lambda images, value: function(images, **{name: value})


FUNCTIONS = {
    "crop": random_crop,
    "shift": random_shift,
    "resized_crop": random_resized_crop,
    "cutout": cutout,
    "erase": random_erasing,
    "mixup": mixup,
    "cutmix": cutmix,
    "randaugment": lambda images, value: randaugment(images, value, 9),
    "magnitude": lambda images, value: randaugment(images, 1, value),
    **{name: keyword(random_affine, name) for name in ("translate", "shear", "rotate")},
    **{name: keyword(color_jitter, name) for name in ("brightness", "contrast", "saturation", "hue")},
}
WHOLE = ("crop", "shift", "cutout", "randaugment", "magnitude")
# The ends of the ranges as they are documented; of those without one, something far out.
INSIDE = {
    "crop": 8, "shift": 8, "resized_crop": 1.0, "translate": 0.94, "shear": 89.0, "rotate": 180.0, "randaugment": 5,
    "magnitude": 30, "brightness": 9.0, "contrast": 9.0, "saturation": 9.0, "hue": 0.5, "cutout": 8, "erase": 1.0,
    "mixup": 1e6, "cutmix": 1e6,
}  # fmt: skip
OUTSIDE = {
    "resized_crop": (1.01, 2), "translate": (1.0, 1.5), "shear": (89.1, 90.0), "rotate": (180.1, 360), "hue": (0.51, 1),
    "erase": (1.01, 3), "magnitude": (31,), **dict.fromkeys(WHOLE[:-1], (2.5, 2.0)),
    **dict.fromkeys(("brightness", "contrast", "saturation", "mixup", "cutmix"), (math.inf,)),
}  # fmt: skip
NO_NUMBERS = ("30", None, True, [1], 1j, math.nan, np.bool_(True), torch.ones(1))


def test_every_number_has_its_range_and_its_function():
    numbers = {field.name for field in fields(Augment) if field.type in ("int", "float", int, float)}
    assert numbers == set(RANGES) == set(FUNCTIONS) == set(INSIDE) == set(OUTSIDE)


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_or_no_number_is_refused_with_what_would_do(name):
    for value in (*OUTSIDE[name], -1, *NO_NUMBERS):
        for refuse in (lambda v: Augment(**{name: v}), lambda v: FUNCTIONS[name](IMAGES, v)):
            with pytest.raises(InvalidInput) as error:
                refuse(value)
            said = str(error.value)
            assert f" is {value!r}: it must be {RANGES[name].what}, " in said
            if name in ("mixup", "cutmix"):
                assert said.endswith(("0 (off) or more", "above 0"))
            else:
                most = RANGES[name].most
                assert said.endswith("or more" if most == math.inf else f"{most:g}")
    with pytest.raises(InvalidInput, match=f"^{name} is -1"):
        Augment(**{name: -1})


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_are_in_range(name):
    for value in (INSIDE[name], 0):
        Augment(**{name: value})
        if value or name not in ("mixup", "cutmix"):
            FUNCTIONS[name](IMAGES, value)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_zero_turns_mixing_off_and_is_no_alpha(name):
    assert not Augment(**{name: 0})
    with pytest.raises(InvalidInput, match=r"alpha of (MixUp|CutMix) is 0: .* above 0"):
        FUNCTIONS[name](IMAGES, 0)


@pytest.mark.parametrize("name", sorted(set(RANGES) - set(WHOLE) - {"mixup", "cutmix"}))
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_numbers_of_numpy_and_torch_do_what_python_s_do(name, kind):
    """As in a Recipe."""
    value = 0.375  # the same in all types
    out = Augment(**{name: kind(value)})(IMAGES, torch.Generator().manual_seed(1))
    assert torch.equal(out, Augment(**{name: value})(IMAGES, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_python_s_own(name, kind):
    """As in a Recipe."""
    with pytest.raises(InvalidInput, match=f"{name} is .*whole number"):
        Augment(**{name: kind(1)})
