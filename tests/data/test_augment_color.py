"""Colour jitter, image by image against torchvision's functions, which take one factor a batch."""

import pytest
import torch
import torchvision.transforms.v2.functional as vision

from resode.data import color_jitter
from resode.data.augment.color import ADJUSTMENTS
from resode.errors import InvalidInput

FACTORS = {
    "brightness": [0.0, 0.4, 1.0, 1.7],
    "contrast": [0.0, 0.4, 1.0, 1.7],
    "saturation": [0.0, 0.4, 1.0, 1.7],
    "hue": [-0.5, -0.21, 0.0, 0.37],
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, channels, dtype=torch.uint8):
    """Random images, some pixels of them grey, black or white, where a hue is not defined."""
    images = torch.randint(0, 256, (n, channels, 8, 9), generator=generator(), dtype=torch.uint8)
    images[:, :, 0] = images[:, :1, 0]
    images[:, :, 1, :4], images[:, :, 1, 4:] = 0, 255
    return images if dtype == torch.uint8 else images.to(dtype) / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(ADJUSTMENTS))
def test_each_image_is_adjusted_as_torchvision_adjusts_one(name, channels, dtype):
    images = pictures(4, channels, dtype)
    before = images.clone()
    out = ADJUSTMENTS[name](images, torch.tensor(FACTORS[name], dtype=torch.float64))
    assert out.dtype == dtype
    assert torch.equal(images, before)
    expected = torch.stack(
        [getattr(vision, f"adjust_{name}")(x, f) for x, f in zip(images, FACTORS[name], strict=True)]
    )
    if dtype == torch.uint8:
        # A rounding of the last bit may cut a whole level off.
        assert (out.int() - expected.int()).abs().max() <= 1
        assert (out != expected).float().mean() < 0.02
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", [1 / 3, -1 / 3])
def test_a_third_of_a_turn_permutes_the_primary_colours(turn):
    image = torch.rand(2, 3, 5, 5, generator=generator(), dtype=torch.float64)
    out = ADJUSTMENTS["hue"](image, torch.full((2,), turn, dtype=torch.float64))
    torch.testing.assert_close(out, image.roll(1 if turn > 0 else -1, dims=1))


@pytest.mark.parametrize("reach", [0.5, 1.5])
def test_factors_are_uniform_about_one_and_never_negative(reach):
    n = 4000
    out = color_jitter(torch.full((n, 1, 1, 1), 0.25, dtype=torch.float64), brightness=reach, generator=generator())
    factor = out.flatten() / 0.25
    low, high = max(0.0, 1 - reach), 1 + reach
    assert low <= factor.min() < low + 0.01
    assert high - 0.01 < factor.max() <= high
    assert abs(factor.mean() - (low + high) / 2) < 4 * (high - low) / (12 * n) ** 0.5


def test_turns_are_uniform_about_zero():
    n = 4000
    red = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[None, :, None, None].expand(n, -1, -1, -1)
    out = color_jitter(red, hue=0.1, generator=generator())[:, :, 0, 0]
    turn = (out[:, 1] - out[:, 2]) / 6  # towards green, or back towards blue
    assert -0.1 <= turn.min() < -0.099
    assert 0.099 < turn.max() <= 0.1
    assert abs(turn.mean()) < 4 * 0.1 / (3 * n) ** 0.5


def test_the_changes_come_in_every_order():
    """Contrast 0 and brightness ½ of an image of mean ½: first the one or first the other."""
    images = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2).expand(500, -1, -1, -1)
    out = color_jitter(images, brightness=1.0, contrast=1.0, generator=generator())
    # Whichever comes first, the mean says the factor of brightness where nothing is clipped; where brightness is above
    # 1 and comes first, the white pixel is clipped, and the mean is at most ½.
    bright = out.mean((1, 2, 3)) > 0.5
    assert 0.1 < bright.float().mean() < 0.4


def test_grey_images_keep_saturation_and_hue():
    images = pictures(5, 1)
    assert torch.equal(color_jitter(images, saturation=0.9, hue=0.5, generator=generator()), images)


def test_other_channels_are_refused():
    with pytest.raises(InvalidInput, match=r"colour jitter .* 1 channel .* or 3 .* these have 4"):
        color_jitter(torch.zeros(2, 4, 5, 5), brightness=0.1)
