"""No augmentation makes an image black: what can is refused, and the edge just inside leaves something of each."""

import itertools
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resode.data import Augment, cutout, random_affine
from resode.data.augment import erasing, geometry, resized_crop, shifts
from resode.data.augment import settings as module
from resode.errors import InvalidInput

# (size, the last settings that leave something, settings just beyond, what the error says of them)
EXACT = [
    ((5, 6), {"shift": 4}, {"shift": 5}, "shift 5 can leave nothing of images of 5 × 6: choose less"),
    ((5, 4), {"crop": 3}, {"crop": 4}, "crop 4 can leave nothing of images of 5 × 4: choose less"),
    ((4, 4), {"crop": 2, "shift": 1}, {"crop": 2, "shift": 2}, "crop 2, shift 2 .* add up to less than a side"),
    ((4, 5), {"translate": 0.87}, {"translate": 0.88}, "translate 0.88 .* 4 × 5: choose less"),
    ((4, 4), {"shift": 1, "translate": 0.5}, {"shift": 1, "translate": 0.7}, "shift 1, translate 0.7 can leave"),
    ((3, 5), {"cutout": 4}, {"cutout": 5}, "cutout of 5 × 5 can blacken images of 3 × 5: .* at most 4"),
    ((5, 3), {"cutout": 4}, {"cutout": 5}, "cutout of 5 × 5 can blacken images of 5 × 3: .* at most 4"),
    ((4, 4), {"shift": 1, "cutout": 2}, {"shift": 1, "cutout": 3}, "of which shift 1 may leave 3 × 3: .* at most 2"),
    ((6, 6), {"crop": 1, "resized_crop": 0.1}, {"crop": 1, "resized_crop": 0.05}, "crop 1, resized_crop 0.05 .*larger"),
    ((8, 8), {"shear": 79.0}, {"shear": 89.0}, "shear 89 can leave nothing .* the middle of an image stays"),
]
# Where an image is turned, too, settings just beyond may leave something after all.
TURNED = [
    ((8, 8), {"rotate": 180.0, "translate": 0.43}, {"rotate": 180.0, "translate": 0.45}, "translate 0.45, rotate 180"),
    ((9, 9), {"shear": 89.0, "rotate": 90.0}, {"shear": 89.0, "shift": 5}, "shift 5, shear 89 can leave nothing"),
    (
        (8, 8),
        {"rotate": 180.0, "translate": 0.25, "cutout": 4},
        {"rotate": 180.0, "translate": 0.25, "cutout": 5},
        "5 × 5",
    ),
    ((4, 12), {"rotate": 90.0, "cutout": 2}, {"rotate": 90.0, "cutout": 3}, "rotate 90 may leave 3 × 3: .* at most 2"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def black(out):
    """Which images are black all over."""
    return (out == 0).flatten(1).all(1)


@pytest.mark.parametrize(("size", "inside", "beyond", "says"), EXACT + TURNED)
def test_the_edge_leaves_something_and_what_lies_beyond_is_refused_before_any_draw(size, inside, beyond, says):
    ones = torch.ones(10000, 1, *size)
    for interpolation in ("nearest", "bilinear"):
        assert not black(Augment(**inside, interpolation=interpolation)(ones, generator())).any()
    g = generator()
    with pytest.raises(InvalidInput, match=says):
        Augment(flip=True, **beyond)(ones, g)
    assert torch.equal(g.get_state(), generator().get_state())


@pytest.mark.parametrize(("size", "beyond"), [(size, beyond) for size, _, beyond, _ in EXACT])
def test_only_what_can_blacken_is_refused(size, beyond, monkeypatch):
    for part in (module, shifts, geometry, erasing):
        monkeypatch.setattr(part, "check_frame", lambda images, **_: None)
    assert black(Augment(**beyond)(torch.ones(20000, 1, *size), generator())).any()


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (lambda x: cutout(x, 5), "cutout of 5 × 5"),
        (lambda x: random_affine(x, translate=0.95), "translate 0.95"),
        (lambda x: random_affine(x, rotate=10.0, translate=0.5), "translate 0.5, rotate 10"),
        (lambda x: random_affine(x, rotate=10.0, shear=88.0), "shear 88, rotate 10"),
    ],
)
def test_each_function_looks_after_itself(transform, says):
    with pytest.raises(InvalidInput, match=re.escape(says)):
        transform(torch.ones(3, 1, 4, 4))


def extremes(monkeypatch):
    """What moves an image is drawn at the ends of its range, or in the middle: the worst that can come."""

    def uniform(low, high, shape, g):
        return low + (high - low) * torch.tensor([0.0, 0.5, 1.0]).double()[torch.randint(3, shape, generator=g)]

    def draw(choices, images, g):
        ends = torch.tensor([0, (choices - 1) // 2, choices - 1])
        return ends[torch.randint(3, (len(images),), generator=g)]

    def below(bounds, g):
        return (uniform(0, 1, bounds.shape, g) * (bounds - 1)).long().clamp(min=0)

    for part, name in itertools.product((shifts, geometry, resized_crop), ("uniform", "draw", "below")):
        if hasattr(part, name):
            monkeypatch.setattr(part, name, locals()[name])


OFF = st.just(0)


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    crop=OFF | st.integers(0, 5),
    shift=OFF | st.integers(0, 5),
    resized_crop=OFF | st.floats(0.05, 1.0),
    translate=OFF | st.floats(0.0, 0.99),
    shear=OFF | st.floats(0.0, 89.0),
    rotate=OFF | st.floats(0.0, 180.0),
    cutout=OFF | st.integers(0, 7),
    interpolation=st.sampled_from(["nearest", "bilinear"]),
)
def test_what_is_accepted_never_makes_an_image_black(size, **chosen):
    ones, augment = torch.ones(1000, 1, *size), Augment(**chosen)
    try:
        augment(ones, generator())
    except InvalidInput:
        assume(False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        extremes(monkeypatch)
        assert not black(augment(ones, generator())).any()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_erasing_always_leaves_something(p):
    ones = torch.ones(5000, 1, 3, 4)
    assert (erasing.random_erasing(ones, p, generator()) == 1).flatten(1).any(1).all()
