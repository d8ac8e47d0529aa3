"""Augmentation: what can come out, how often, and that nothing but the generator decides."""

import json
import math
from dataclasses import asdict

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


# Each setting by itself, and all of them at once.
SETTINGS = {
    "flip": True, "crop": 1, "shift": 1, "resized_crop": 0.4, "translate": 0.3, "shear": 20.0, "rotate": 30.0,
    "randaugment": 2, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2, "cutout": 2, "erase": 0.5,
}  # fmt: skip
EACH = [Augment(**{name: value}) for name, value in SETTINGS.items()]
ALL = Augment(**SETTINGS)


@pytest.mark.parametrize("augment", [*EACH, ALL])
def test_the_generator_alone_decides(augment):
    images = torch.randint(0, 256, (20, 3, 16, 12), generator=generator(), dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    out = augment(images, generator(5))
    torch.manual_seed(99)
    again = augment(images, generator(5))
    torch.set_rng_state(state)
    assert torch.equal(out, again)
    assert not torch.equal(out, augment(images, generator(6)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("augment", [*EACH, ALL])
def test_each_image_is_augmented_by_itself(augment, dtype):
    """Equal images become different ones, and shape, type and range stay."""
    image = torch.randint(0, 256, (1, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    image = image if dtype == torch.uint8 else image / 255
    out = augment(image.expand(64, -1, -1, -1), generator())
    assert (out.shape, out.dtype) == ((64, 3, 12, 12), dtype)
    assert out.min() >= 0
    assert out.max() <= (255 if dtype == torch.uint8 else 1.0001)
    assert len({one.numpy().tobytes() for one in out}) > (1 if augment == Augment(flip=True) else 5)


@pytest.mark.parametrize("augment", EACH)
def test_an_image_is_augmented_alike_whatever_the_others_are(augment):
    """What is drawn for an image depends on its place alone, never on pixels."""
    images = torch.randint(0, 256, (20, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    others = images.flip(0)
    others[7] = images[7]
    assert torch.equal(augment(images, generator(2))[7], augment(others, generator(2))[7])


def numbers_drawn(augment, images, seed):
    """How far a call moves the generator on, in its own numbers of 32 bits."""
    g = generator(seed)
    augment(images, g)
    following = torch.rand(8, generator=g)  # of float32, each takes one
    stream = torch.rand(40000, generator=generator(seed))
    return int((stream.unfold(0, 8, 1) == following).all(1).nonzero().squeeze())


@pytest.mark.parametrize("augment", EACH)
def test_how_much_is_drawn_depends_on_pixels_never_and_on_draws_in_random_erasing_alone(augment):
    images = torch.randint(0, 256, (20, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    drawn = [numbers_drawn(augment, images, seed) for seed in range(5)]
    assert drawn == [numbers_drawn(augment, images.flip(0) // 2, seed) for seed in range(5)]
    assert min(drawn) >= 20
    assert (len(set(drawn)) == 1) == (not augment.erase)


def test_settings_are_applied_in_their_order():
    images = torch.randint(0, 256, (8, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    g, expected = generator(4), images
    moves = {name: SETTINGS[name] for name in ("translate", "shear", "rotate")}
    colors = {name: SETTINGS[name] for name in ("brightness", "contrast", "saturation", "hue")}
    for augment in [
        *(Augment(**{name: SETTINGS[name]}) for name in ("flip", "crop", "shift", "resized_crop")),
        Augment(**moves),
        Augment(randaugment=2),
        Augment(**colors),
        Augment(cutout=2),
        Augment(erase=0.5),
    ]:
        expected = augment(expected, g)
    assert torch.equal(ALL(images, generator(4)), expected)


def test_the_settings_are_plain_values_and_off_by_default():
    assert Augment(**json.loads(json.dumps(asdict(ALL)))) == ALL
    off = asdict(Augment())
    assert {name: value for name, value in off.items() if value} == {"interpolation": "bilinear", "magnitude": 9}
    for name, value in {**SETTINGS, "alternate_flip": True, "mixup": 0.2, "cutmix": 1.0}.items():
        assert not off[name]
        assert Augment(**{name: value})
    assert [name for name in off if Augment(**{name: SETTINGS.get(name, off[name]) or 1}).mixes] == ["mixup", "cutmix"]


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
    for augment in EACH:
        out = augment(images.cuda(), generator(1))
        assert out.is_cuda
        # A level of grey may be rounded the other way where it is computed.
        assert ((out.cpu().int() - augment(images, generator(1)).int()).abs() > 1).float().mean() < 0.01


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
    for dtype in (torch.uint8, torch.float32):
        out = ALL(torch.zeros(0, 3, 12, 12, dtype=dtype), generator())
        assert (out.shape, out.dtype) == ((0, 3, 12, 12), dtype)


def test_another_interpolation_is_refused():
    with pytest.raises(InvalidInput, match="interpolation 'cubic': choose from nearest, bilinear"):
        Augment(interpolation="cubic")


@pytest.mark.parametrize("augment", [*EACH, Augment(alternate_flip=True)])
def test_points_cannot_be_augmented(augment):
    with pytest.raises(InvalidInput, match=r"shape \(4, 2\).*Augment\(\)"):
        augment(torch.zeros(4, 2), generator())


@pytest.mark.parametrize("transform", [random_crop, random_shift])
def test_bad_translations_are_refused(transform):
    with pytest.raises(InvalidInput, match="-1"):
        transform(IMAGE, -1)
    with pytest.raises(InvalidInput, match=r"shift 5 can leave nothing of images of 5 × 6: choose less"):
        transform(IMAGE, 5)
    assert transform(IMAGE, 4, generator()).shape == IMAGE.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_generator_is_refused():
    with pytest.raises(InvalidInput, match="on the CPU"):
        random_flip(IMAGE, torch.Generator("cuda"))
