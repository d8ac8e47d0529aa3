"""Cutout and random erasing: which pixels, how often, with what."""

import math

import pytest
import torch

from resode.data import cutout, random_erasing
from resode.errors import InvalidInput


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hull(mask):
    """(top, left, rows, columns) of the smallest rectangle around the pixels marked in (H, W)."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_blackens_a_square_whose_centre_is_anywhere(dtype, channels, side):
    height, width, n = 6, 8, 6 * 8 * 60
    images = torch.ones(n, channels, height, width, dtype=dtype)
    out = cutout(images, side, generator())
    assert out.dtype == dtype
    assert images.min() == 1
    assert (out == out[:, :1]).all()  # all channels alike
    squares = {}
    for i in range(height):
        for j in range(width):
            square = torch.ones(height, width)
            rows = slice(max(i - side // 2, 0), i - side // 2 + side)
            square[rows, max(j - side // 2, 0) : j - side // 2 + side] = 0
            squares.setdefault(square.numpy().tobytes(), []).append((i, j))
    count = dict.fromkeys(squares, 0)
    for image in out[:, 0].float():
        count[image.numpy().tobytes()] += 1  # no others
    chi2 = sum((count[key] - 60 * len(at)) ** 2 / (60 * len(at)) for key, at in squares.items())
    assert chi2 < len(squares) - 1 + 4 * math.sqrt(2 * (len(squares) - 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_draws_the_rectangles_of_the_paper(dtype, channels):
    n, height, width, p = 1500, 40, 50, 0.6
    images = torch.full((n, channels, height, width), 0 if dtype == torch.uint8 else 2, dtype=dtype)
    out = random_erasing(images, p, generator())
    assert out.dtype == dtype
    changed = (out != images).any(1)
    erased = changed.flatten(1).any(1)
    assert abs(erased.sum() - p * n) < 4 * math.sqrt(n * p * (1 - p))
    tops, lefts, rows, columns = torch.tensor([hull(mask) for mask in changed[erased]], dtype=torch.float64).T
    # Every pixel of the rectangle is replaced, and floating noise is below 1; of uint8 one value in 256 is black again.
    filled = changed.sum((1, 2))[erased] / (rows * columns)
    assert filled.min() > (0.9 if dtype == torch.uint8 else 1 - 1e-9)
    share, ratio = rows * columns / (height * width), rows / columns
    assert share.min() > 0.02 - 0.005
    assert share.max() < 0.4 + 0.01
    assert 0.3 * 0.9 < ratio.min() < 0.4
    assert 2.8 < ratio.max() < 1.1 / 0.3
    # Most draws fit, so the mean share is near that of U(0.02, 0.4); those that do not have the larger ones.
    assert share.mean() == pytest.approx(0.2, abs=0.02)
    # Uniform over the places that are free.
    for start, free in ((tops, height - rows), (lefts, width - columns)):
        place = (start + 0.5) / (free + 1)
        assert abs(place.mean() - 0.5) < 4 / math.sqrt(12 * len(rows))
        assert place.var() == pytest.approx(1 / 12, rel=0.15)


def test_the_size_is_drawn_until_it_is_smaller_than_the_image_and_the_place_where_it_fits():
    """Image by image, from the same numbers; a rectangle never sticks out of the frame, where it would be clipped."""
    n, height, width = 400, 9, 7
    found = (random_erasing(torch.full((n, 1, height, width), 2.0), 1.0, generator()) < 2)[:, 0]
    g = generator()
    torch.rand(n, generator=g, dtype=torch.float64)  # the coins
    sizes, places = (torch.rand(2, k, n, generator=g, dtype=torch.float64) for k in (10, 1))
    for i in range(n):
        expected = torch.zeros(height, width, dtype=torch.bool)
        for share, ratio in sizes[:, :, i].T.tolist():
            area, ratio = (0.02 + 0.38 * share) * height * width, 0.3 + (1 / 0.3 - 0.3) * ratio
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < height and wide < width:
                down, along = places[:, 0, i].tolist()
                top, left = int(down * (height - tall + 1)), int(along * (width - wide + 1))
                expected[top : top + tall, left : left + wide] = True
                break
        assert torch.equal(found[i], expected)


def test_noise_is_uniform_on_the_range_of_the_type():
    zeros = torch.zeros(300, 3, 16, 16, dtype=torch.uint8)
    noise = random_erasing(zeros, 1.0, generator())
    level = noise[noise > 0].float()
    assert (level.min(), level.max()) == (1, 255)
    assert level.mean() == pytest.approx(128, rel=0.01)
    assert level.std() == pytest.approx(math.sqrt((255**2 - 1) / 12), rel=0.01)
    value = random_erasing(zeros.float(), 1.0, generator())
    value = value[value > 0]
    assert value.max() < 1
    assert value.mean() == pytest.approx(0.5, rel=0.01)
    assert value.std() == pytest.approx(12**-0.5, rel=0.01)
    assert (noise[:, 0] != noise[:, 1]).any()  # each channel has its own


def test_an_image_where_nothing_fits_is_left_alone():
    images = torch.ones(50, 1, 1, 9)
    assert torch.equal(random_erasing(images, 1.0, generator()), images)


def test_erasing_never_does_nothing():
    images = torch.ones(50, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(random_erasing(images, 0.0, generator()), images)
    assert images.min() == images.max() == 1


def test_bad_input_is_refused():
    with pytest.raises(InvalidInput, match="side of cutout is -1"):
        cutout(torch.ones(1, 1, 5, 5), -1)
    for transform in (cutout, random_erasing):
        with pytest.raises(InvalidInput, match=r"shape \(4, 2\)"):
            transform(torch.zeros(4, 2), 1)
