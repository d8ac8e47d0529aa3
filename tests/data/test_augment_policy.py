"""RandAugment: the operations against torchvision's own, one image at a time, and how they are drawn."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandAugment, v2
from torchvision.transforms.autoaugment import _apply_op

from resode.data import Augment, randaugment
from resode.data.augment import policy
from resode.data.augment.policy import BINS, OPERATIONS, SIGNED, operate, strength
from resode.errors import InvalidInput

SIZE = (20, 26)
SPACE = RandAugment()._augmentation_space(BINS, SIZE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, channels, dtype=torch.uint8):
    """Random images of few levels, so that their histograms are not flat."""
    images = torch.randint(10, 14, (n, channels, *SIZE), generator=generator(), dtype=torch.uint8) ** 2
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def by_torchvision(image, name, m):
    """One operation on one image, as ``transforms.v2.RandAugment`` does it; it counts Solarize in shares of white."""
    share = m / 255 if name == "Solarize" else m
    return v2.RandAugment()._apply_image_or_video_transform(
        image, name, share, interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: None}
    )


def test_the_operations_and_their_signs_are_torchvision_s():
    assert len(OPERATIONS) == len(SPACE) == 14
    assert set(OPERATIONS) == set(SPACE)
    assert set(SIGNED) == {name for name, (_, signed) in SPACE.items() if signed}


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_are_torchvision_s(name):
    bins, _ = SPACE[name]
    expected = bins.double() if bins.ndim else torch.zeros(BINS, dtype=torch.float64)
    ours = torch.tensor([strength(name, m, SIZE) for m in range(BINS)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_is_operated_on_as_each_image_by_torchvision(name, magnitude, channels):
    images = pictures(3, channels)
    for sign in (1, -1) if name in SIGNED else (1,):
        m = sign * strength(name, magnitude, SIZE)
        out = operate(images, name, m)
        assert out.dtype == torch.uint8
        assert torch.equal(out, torch.stack([by_torchvision(x, name, m) for x in images]))
        # The older implementation rounds elsewhere, and is the same otherwise.
        older = [_apply_op(x, name, m, interpolation=InterpolationMode.NEAREST, fill=None) for x in images]
        assert (out.int() - torch.stack(older).int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_floating_images_are_operated_on_as_uint8_ones(name, channels):
    m = strength(name, 20, SIZE)
    images = pictures(3, channels)
    out = operate(images.float() / 255, name, m)
    assert out.dtype == torch.float32
    # uint8 cuts levels off, and posterizing cuts floats at other places: within its step.
    step = 2 ** (8 - int(m)) if name == "Posterize" else 2
    assert (255 * out - operate(images, name, m).float()).abs().max() <= step + 0.01


def test_color_leaves_grey_images_alone():
    images = pictures(4, 1)
    assert torch.equal(operate(images, "Color", 0.9), images)


def test_a_batch_gets_what_its_images_get_one_by_one():
    """The grouping is right: every image goes through its own operations, in their order."""
    images, number, magnitude = pictures(120, 3), 3, 12
    out = randaugment(images, number, magnitude, generator(1))
    g = generator(1)
    expected = list(images)
    for _ in range(number):
        kinds, coins = torch.rand(2, 120, generator=g, dtype=torch.float64).tolist()
        for i, (kind, coin) in enumerate(zip(kinds, coins, strict=True)):
            name = OPERATIONS[int(14 * kind)]
            m = strength(name, magnitude, SIZE) * (-1 if coin < 0.5 and name in SIGNED else 1)
            expected[i] = by_torchvision(expected[i], name, m)
    assert torch.equal(out, torch.stack(expected))


def test_operations_and_signs_are_drawn_uniformly(monkeypatch):
    met = {}

    def note(images, name, m):
        met[name, m > 0, m < 0] = met.get((name, m > 0, m < 0), 0) + len(images)
        return images

    monkeypatch.setattr(policy, "operate", note)
    n = 14 * 2000
    randaugment(torch.zeros(n, 1, 5, 5, dtype=torch.uint8), 1, 9, generator())
    assert sum(met.values()) == n
    assert len(met) == 14 + len(SIGNED)
    for (name, _, _), count in met.items():
        share = (1 / 28) if name in SIGNED else 1 / 14
        assert abs(count - n * share) < 4.5 * (n * share) ** 0.5


def test_images_are_left_as_they_were_and_none_is_a_no_op():
    images = pictures(30, 3)
    before = images.clone()
    out = randaugment(images, 2, 9, generator())
    assert torch.equal(images, before)
    assert not torch.equal(out, images)
    assert torch.equal(randaugment(images, 0, 9, generator()), images)


def test_bad_settings_are_refused():
    for magnitude in (-1, 31, 2.0, True):
        with pytest.raises(InvalidInput, match=f"magnitude is {magnitude}: .*from 0 to 30"):
            Augment(randaugment=2, magnitude=magnitude)
    for number in (-1, 1.5, True):
        with pytest.raises(InvalidInput, match=f"randaugment is {number}"):
            Augment(randaugment=number)
    with pytest.raises(InvalidInput, match=r"RandAugment .* these have 2"):
        randaugment(torch.zeros(2, 2, 5, 5, dtype=torch.uint8), 1, 9)
