"""Augmentation: what can come out, how often, and that nothing but the generator decides."""

import math

import pytest
import torch

from resode.data import Augment, random_crop, random_flip, random_shift
from resode.errors import InvalidInput

# Every pixel has a value of its own and none is 0, so that what a pixel became tells where it went.
IMAGE = torch.arange(1, 2 * 5 * 6 + 1, dtype=torch.uint8).reshape(1, 2, 5, 6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def translate(image, dy, dx):
    """The translation, pixel by pixel, from its definition."""
    out = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - dy < height and 0 <= j - dx < width:
                out[..., i, j] = image[..., i - dy, j - dx]
    return out


def places(images, reach):
    """How many images lie at each translation of IMAGE; fails if one is no translation of it."""
    steps = range(-reach, reach + 1)
    count = torch.tensor(
        [[(images == translate(IMAGE, dy, dx)).flatten(1).all(1).sum() for dx in steps] for dy in steps]
    )
    assert count.sum() == len(images)
    return count


def test_flip_gives_the_image_or_its_mirror_half_the_time():
    n = 4000
    out = random_flip(IMAGE.expand(n, -1, -1, -1), generator())
    same, mirrored = ((out == image).flatten(1).all(1) for image in (IMAGE, IMAGE.flip(-1)))
    assert (same ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    # Neighbours in a batch are mirrored independently: they agree half the time.
    assert abs((mirrored[1:] == mirrored[:-1]).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_the_same_flip_twice_is_the_identity():
    images = torch.randint(0, 256, (50, 3, 4, 5), generator=generator(), dtype=torch.uint8)
    once = random_flip(images, generator(1))
    assert not torch.equal(once, images)
    assert torch.equal(random_flip(once, generator(1)), images)


@pytest.mark.parametrize("transform", [random_crop, random_shift])
@pytest.mark.parametrize("pixels", [1, 3])
def test_a_crop_is_a_translation_uniform_over_its_places(transform, pixels):
    cells = (2 * pixels + 1) ** 2
    n = 200 * cells
    count = places(transform(IMAGE.expand(n, -1, -1, -1), pixels, generator()), pixels)
    # χ² with cells − 1 degrees of freedom, four standard deviations above its mean.
    chi2 = ((count - 200.0) ** 2 / 200.0).sum()
    assert chi2 < cells - 1 + 4 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("pixels", [1, 2])
def test_a_crop_is_what_torchvision_crops(pixels):
    """The translates are also the windows of the zero-padded image: all of them, and no others."""
    from torchvision.transforms.functional import crop, pad

    padded = pad(IMAGE, pixels)
    sides = range(2 * pixels + 1)
    windows = {crop(padded, top, left, 5, 6).numpy().tobytes() for top in sides for left in sides}
    out = random_crop(IMAGE.expand(1000, -1, -1, -1), pixels, generator())
    assert {image.numpy().tobytes() for image in out} == windows


def test_crop_and_shift_together_add_up():
    out = Augment(crop=1, shift=1)(torch.ones(2000, 1, 5, 5), generator())
    rows, columns = out.sum(3).amax(1).gt(0).sum(1), out.sum(2).amax(1).gt(0).sum(1)
    assert rows.min() == columns.min() == 3
    assert rows.max() == columns.max() == 5


@pytest.mark.parametrize("augment", [Augment(flip=True), Augment(crop=2), Augment(flip=True, crop=1, shift=2)])
def test_the_generator_alone_decides(augment):
    images = torch.randint(0, 256, (20, 3, 6, 5), generator=generator(), dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    out = augment(images, generator(5))
    torch.manual_seed(99)
    again = augment(images, generator(5))
    torch.set_rng_state(state)
    assert torch.equal(out, again)
    assert not torch.equal(out, augment(images, generator(6)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_images_move_as_uint8_ones_do(dtype):
    images = torch.randint(0, 256, (20, 3, 6, 5), generator=generator(), dtype=torch.uint8)
    augment = Augment(flip=True, crop=2, shift=1)
    out = augment(images.to(dtype), generator(1))
    assert out.dtype == dtype
    assert torch.equal(out, augment(images, generator(1)).to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_images():
    images = torch.randint(0, 256, (20, 3, 6, 5), generator=generator(), dtype=torch.uint8)
    augment = Augment(flip=True, crop=2, shift=1)
    out = augment(images.cuda(), generator(1))
    assert out.is_cuda
    assert torch.equal(out.cpu(), augment(images, generator(1)))


def test_without_a_generator_torch_s_default_one_draws():
    images = torch.randint(0, 256, (20, 1, 6, 6), generator=generator(), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        out = Augment(flip=True, crop=2)(images)
    assert torch.equal(out, Augment(flip=True, crop=2)(images, generator(3)))


def test_no_augmentation_returns_what_it_was_given():
    points = torch.zeros(3, 2)
    assert Augment()(points) is points
    assert not Augment()
    assert all([Augment(flip=True), Augment(crop=1), Augment(shift=1)])


def test_an_empty_batch_stays_empty():
    out = Augment(flip=True, crop=1, shift=1)(torch.zeros(0, 3, 4, 4), generator())
    assert out.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("name", ["crop", "shift"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_pixels_are_whole_numbers(name, value):
    with pytest.raises(InvalidInput, match=f"{name} is {value}"):
        Augment(**{name: value})


@pytest.mark.parametrize("augment", [Augment(flip=True), Augment(crop=1), Augment(shift=1)])
def test_points_cannot_be_augmented(augment):
    with pytest.raises(InvalidInput, match=r"shape \(4, 2\).*Augment\(\)"):
        augment(torch.zeros(4, 2), generator())


@pytest.mark.parametrize("transform", [random_crop, random_shift])
def test_bad_translations_are_refused(transform):
    with pytest.raises(InvalidInput, match="-1"):
        transform(IMAGE, -1)
    with pytest.raises(InvalidInput, match=r"5 pixels .* 5 × 6: at most 4"):
        transform(IMAGE, 5)
    assert transform(IMAGE, 4, generator()).shape == IMAGE.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_generator_is_refused():
    with pytest.raises(InvalidInput, match="on the CPU"):
        random_flip(IMAGE, torch.Generator("cuda"))
