"""Rotation, shear, translation and resized crops, image by image against torchvision's, which take one map a batch."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as vision
from torchvision.transforms import RandomResizedCrop

from resode.data import random_affine, random_resized_crop
from resode.data.augment.geometry import affine
from resode.data.augment.resized_crop import resized_crop
from resode.errors import InvalidInput

DTYPES = [torch.uint8, torch.float32, torch.float64]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, channels, size, dtype=torch.uint8):
    images = torch.randint(0, 256, (n, channels, *size), generator=generator(), dtype=torch.uint8)
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def levels(image, other):
    """Greatest difference in levels of grey."""
    scale = 1 if image.dtype == torch.uint8 else 255
    return float((image.double() - other.double()).abs().max()) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_each_image_is_mapped_as_torchvision_maps_one(dtype, channels, interpolation):
    images = pictures(6, channels, (9, 12), dtype)
    angle = torch.tensor([0.0, 31.7, -122.3, 11.9, 0.0, -7.7])
    shear = torch.tensor([0.0, 0.0, 14.2, -41.3, 27.1, 3.3])
    shift = torch.tensor([[2, -3], [0, 0], [1, 4], [-5, 0], [0, 0], [3, 1]])
    out = affine(images, angle, shear, shift, interpolation)
    assert out.dtype == dtype
    for one, image, a, s, move in zip(out, images, angle.tolist(), shear.tolist(), shift.tolist(), strict=True):
        mode = vision.InterpolationMode(interpolation)
        expected = vision.affine(image, a, move, 1.0, [s, 0.0], interpolation=mode)
        # float32 grids: at a half a level may go the other way.
        assert levels(one, expected) < (1.1 if dtype == torch.uint8 else 0.01)
        if dtype == torch.uint8:
            assert (one != expected).float().mean() < 0.02


def test_a_quarter_turn_is_that_of_rot90():
    images = pictures(2, 3, (8, 8))
    out = affine(images, torch.tensor([90.0, -90.0]), torch.zeros(2), torch.zeros(2, 2), "nearest")
    assert torch.equal(out[0], images[0].rot90(-1, (1, 2)))
    assert torch.equal(out[1], images[1].rot90(1, (1, 2)))


def test_half_precision_images_are_mapped():
    images = pictures(2, 3, (8, 8), torch.float32)
    out = random_affine(images.half(), rotate=30.0, generator=generator())
    assert out.dtype == torch.float16
    assert levels(out, random_affine(images, rotate=30.0, generator=generator())) < 0.5


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_translation_is_by_whole_pixels_up_to_its_share(interpolation):
    n = 3000
    images = torch.zeros(n, 1, 15, 21, dtype=torch.uint8)
    images[:, :, 7, 10] = 255
    out = random_affine(images, translate=0.2, interpolation=interpolation, generator=generator())
    place = (out == 255).nonzero()
    assert len(place) == n
    for axis, (middle, reach) in {2: (7, 3), 3: (10, 4)}.items():
        moved = place[:, axis] - middle
        assert moved.abs().max() == reach
        # Rounded from U(−0.2·side, 0.2·side): the ends have what rounds to them.
        bound = 0.2 * images.shape[axis]
        ends = (bound - (reach - 0.5)) / (2 * bound)
        assert abs((moved == reach).float().mean() - ends) < 4 * (ends * (1 - ends) / n) ** 0.5


def test_angles_are_uniform_and_each_image_has_its_own():
    """The angle of a turned ray: its mean is 0, its variance a third of the square of the largest."""
    n = 2000
    images = torch.zeros(n, 1, 61, 61)
    images[:, :, 30, 55] = 1.0
    x = torch.arange(61) - 30.0
    for setting, at_most in ({"rotate": 20.0}, 20.0), ({"rotate": 180.0}, 180.0):
        out = random_affine(images, **setting, generator=generator())[:, 0]
        total = out.sum((1, 2))
        angle = torch.atan2((out.sum(2) @ x) / total, (out.sum(1) @ x) / total).rad2deg()
        assert angle.abs().max() <= at_most + 1.5
        assert abs(angle.mean()) < 4 * at_most / (3 * n) ** 0.5
        assert angle.var() == pytest.approx(at_most**2 / 3, rel=0.1)


def test_a_shear_moves_rows_and_leaves_them_rows():
    n = 1000
    images = torch.zeros(n, 1, 41, 41)
    images[:, :, 10, 20] = 1.0
    out = random_affine(images, shear=30.0, generator=generator())[:, 0]
    assert out[:, :10].sum() + out[:, 11:].sum() < 1e-3
    moved = (out[:, 10] @ (torch.arange(41) - 20.0)) / out[:, 10].sum(1)
    tangent = moved / 10  # the point lies ten pixels above the centre
    assert tangent.abs().max() <= math.tan(math.radians(30)) + 1e-3
    angle = tangent.atan().rad2deg()
    assert angle.var() == pytest.approx(30**2 / 3, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_stretched_as_torchvision_stretches_it(dtype, channels):
    images = pictures(5, channels, (9, 12), dtype)
    parts = torch.tensor([[9, 12, 0, 0], [4, 7, 5, 5], [1, 1, 8, 11], [6, 5, 0, 3], [9, 2, 0, 10]])
    out = resized_crop(images, *parts.T)
    for one, image, (tall, wide, top, left) in zip(out, images, parts.tolist(), strict=True):
        expected = vision.resized_crop(image, top, left, tall, wide, [9, 12], antialias=True)
        assert levels(one, expected) < (1.1 if dtype == torch.uint8 else 0.01)


def parts_of(n, size, least):
    """(n, 4) rows, columns, top and left of what `random_resized_crop` takes, read from images of coordinates."""
    height, width = size
    rows = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.float64)[None, :].expand(height, width)
    out = random_resized_crop(torch.stack([rows, columns]).expand(n, -1, -1, -1), least, generator())
    # Two neighbours in the middle are length/side apart, and the middle of the result is the middle of the part.
    found = []
    for axis, side in enumerate(size):
        line = out[:, 0, :, 0] if axis == 0 else out[:, 1, 0, :]
        length = (line[:, side // 2] - line[:, side // 2 - 1]) * side
        middle = (line[:, side // 2] + line[:, side // 2 - 1]) / 2
        found.append((length.round(), (middle - (length.round() - 1) / 2).round()))
    (tall, top), (wide, left) = found
    return torch.stack([tall, wide, top, left], dim=1)


def test_parts_are_drawn_as_torchvision_draws_them():
    """The same distribution: means and deviations of area, ratio and place against RandomResizedCrop's own draws."""
    n, size = 3000, (40, 48)
    ours = parts_of(n, size, 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [RandomResizedCrop.get_params(torch.zeros(1, *size), [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = torch.tensor(draws, dtype=torch.float64)[:, [2, 3, 0, 1]]
    for parts in (ours, theirs):
        assert (parts[:, 0] + parts[:, 2] <= 40).all()
        assert (parts[:, 1] + parts[:, 3] <= 48).all()
        assert parts.min() >= 0
    statistics = [torch.stack([p[:, 0] * p[:, 1], p[:, 1] / p[:, 0], p[:, 2], p[:, 3]], dim=1) for p in (ours, theirs)]
    one, other = statistics
    assert ((one.mean(0) - other.mean(0)).abs() < 4 * (one.var(0) * 2 / n).sqrt()).all()
    torch.testing.assert_close(one.std(0), other.std(0), rtol=0.08, atol=0)


@pytest.mark.parametrize(("size", "part"), [((40, 4), (5, 4, 17, 0)), ((4, 40), (4, 5, 0, 17))])
def test_where_no_draw_fits_the_middle_is_taken(size, part):
    assert (parts_of(20, size, 1.0) == torch.tensor(part)).all()


def test_bad_images_and_names_are_refused():
    images = pictures(2, 1, (5, 5))
    with pytest.raises(InvalidInput, match=r"bicubic.*nearest, bilinear"):
        random_affine(images, rotate=1.0, interpolation="bicubic")
    for transform in (lambda x: random_affine(x, rotate=1.0), lambda x: random_resized_crop(x, 0.5)):
        with pytest.raises(InvalidInput, match=r"shape \(4, 2\)"):
            transform(torch.zeros(4, 2))
        with pytest.raises(InvalidInput, match="int64"):
            transform(torch.zeros(2, 1, 5, 5, dtype=torch.int64))
