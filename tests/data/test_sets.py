"""The data sets: their splits, their standardization, their batches, and the errors of what cannot be loaded.

Nothing here is downloaded: the files of torchvision's sets and the image folders are tiny, and made on the spot.
"""

import pickle
import urllib.request
import warnings
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import to_pil_image

from resode.data import NAMES, Augment, Split, check_name, load
from resode.data.dataset import Batches
from resode.data.splits import hold_out, redraw_labels
from resode.errors import InvalidInput

OFFLINE = ("digits", "moons", "circles")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(split):
    """The examples of a split as a list of bytes, in order."""
    return [x.numpy().tobytes() + bytes([y]) for x, y in zip(split.inputs, split.labels, strict=True)]


def numbered(labels):
    """A split in which the point of example i is (i, 0)."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    points = torch.stack([torch.arange(len(labels)), torch.zeros(len(labels))], dim=1).float()
    return Split(points, labels)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# Splits


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.floats(0.05, 0.9), st.none() | st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_hold_out_cuts_every_class_in_proportion(labels, fraction, seed):
    split = numbered(labels)
    number = int(fraction * len(labels) + 0.5)
    if number in (0, len(labels)):
        with pytest.raises(InvalidInput, match="leaves one part empty"):
            hold_out(split, fraction, None if seed is None else generator(seed))
        return
    kept, out = hold_out(split, fraction, None if seed is None else generator(seed))
    assert len(out) == number
    assert sorted(rows(kept) + rows(out)) == sorted(rows(split))
    for label in set(labels):
        assert abs((out.labels == label).sum() - fraction * labels.count(label)) < 1


def test_hold_out_chooses_by_the_generator_alone_and_each_example_alike():
    split = numbered([0, 1] * 50)
    assert rows(hold_out(split, 0.3, generator(1))[1]) == rows(hold_out(split, 0.3, generator(1))[1])
    held = torch.stack([hold_out(split, 0.3, generator(s))[1].inputs[:, 0].long() for s in range(400)])
    share = torch.bincount(held.flatten(), minlength=100) / 400
    assert (share - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / 400) ** 0.5


@pytest.mark.parametrize("name", OFFLINE)
def test_the_seed_decides_the_validation_split_and_nothing_else(name):
    one, same, other = load(name, seed=1), load(name, seed=1), load(name, seed=2)
    assert rows(one.train) == rows(same.train)
    assert rows(one.validation) == rows(same.validation)
    assert rows(one.validation) != rows(other.validation)
    assert rows(one.test) == rows(other.test) == rows(load(name, seed=3, validation=0.5, label_noise=0.5).test)
    assert sorted(rows(one.train) + rows(one.validation)) == sorted(rows(other.train) + rows(other.validation))


@pytest.mark.parametrize("name", OFFLINE)
def test_the_splits_are_disjoint(name):
    data = load(name, validation=0.25)
    train, validation, test = (set(rows(split)) for split in (data.train, data.validation, data.test))
    assert len(train) == len(data.train)  # no duplicates, so that disjoint sets are disjoint splits
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_no_validation_leaves_all_to_training():
    data = load("digits", validation=0)
    assert len(data.validation) == 0
    assert len(data.train) + len(data.test) == 1797
    assert list(data.batches("validation", 10)) == []


def test_digits():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert (data.name, data.classes, data.channels, data.size) == ("digits", 10, 1, (8, 8))
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    whole = load("digits", validation=0)
    images, labels = load_digits(return_X_y=True)
    expected = sorted(zip(images.tolist(), labels.tolist(), strict=True))
    levels = torch.cat([whole.train.inputs, whole.test.inputs]).flatten(1) * (16 / 255)
    assert levels.sub(levels.round()).abs().max() < 0.05
    got = zip(levels.round().tolist(), torch.cat([whole.train.labels, whole.test.labels]).tolist(), strict=True)
    assert sorted(got) == expected
    assert whole.train.inputs.max() == 255
    share = torch.bincount(data.test.labels) / torch.from_numpy(np.bincount(labels))
    assert (share - 0.2).abs().max() < 1 / 170


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_points(name):
    data = load(name)
    assert (data.classes, data.channels, data.size) == (2, 2, None)
    assert data.train.inputs.dtype == torch.float32
    assert (len(data.train), len(data.validation), len(data.test)) == (1800, 200, 1000)
    assert data.test.labels.float().mean() == 0.5


def test_circles_are_told_apart_by_their_radius():
    test = load("circles").test
    inner = test.inputs.norm(dim=1) < 0.75
    assert (inner == test.labels.bool()).float().mean() > 0.99


# Label noise


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_label_noise_redraws_its_fraction_of_the_training_labels(noise):
    clean, noisy = load("digits", seed=4), load("digits", seed=4, label_noise=noise)
    assert torch.equal(clean.train.inputs, noisy.train.inputs)
    assert rows(clean.validation) == rows(noisy.validation)
    assert rows(clean.test) == rows(noisy.test)
    n = len(clean.train)
    redrawn = round(noise * n)
    changed = (clean.train.labels != noisy.train.labels).sum().item()
    assert changed <= redrawn
    # Of those drawn anew, one in ten comes out as it was.
    assert abs(changed - 0.9 * redrawn) < 4 * (0.9 * 0.1 * redrawn) ** 0.5
    assert torch.equal(noisy.train.labels, load("digits", seed=4, label_noise=noise).train.labels)


def test_new_labels_are_uniform_over_the_classes():
    noisy = redraw_labels(numbered([3] * 5000), 1.0, 5, generator())
    assert (torch.bincount(noisy.labels, minlength=5) / 5000 - 0.2).abs().max() < 4 * (0.2 * 0.8 / 5000) ** 0.5


def test_more_noise_makes_the_changes_of_less_noise():
    split = numbered([0] * 500)
    less, more = (redraw_labels(split, noise, 10, generator()).labels for noise in (0.1, 0.4))
    assert (less != 0).sum() > 0
    assert torch.equal(more[less != 0], less[less != 0])


# Standardization


@pytest.mark.parametrize("name", OFFLINE)
def test_standardized_training_inputs_have_mean_0_and_variance_1(name):
    data = load(name)
    x = data.standardize(data.train.inputs)
    assert x.dtype == torch.float32
    channels = x.double().transpose(0, 1).flatten(1)
    assert channels.mean(1).abs().max() < 1e-5
    assert (channels.var(1, correction=0) - 1).abs().max() < 1e-5


def test_images_are_scaled_to_the_unit_interval_first():
    data = load("digits")
    pixels = data.train.inputs.double() / 255
    assert data.mean.shape == data.std.shape == (1,)
    assert data.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)
    inputs = data.test.inputs
    torch.testing.assert_close(data.standardize(inputs), data.standardize(inputs.double() / 255))


def test_inputs_of_another_set_are_refused():
    with pytest.raises(InvalidInput, match=r"\(5, 3, 8, 8\) .* digits: expected \(N, 1, H, W\)"):
        load("digits").standardize(torch.zeros(5, 3, 8, 8))
    with pytest.raises(InvalidInput, match=r"expected \(N, 2\)"):
        load("moons").standardize(torch.zeros(5, 2, 1, 1))


# Batches


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_batches_without_a_generator_come_in_order(digits):
    batches = list(digits.batches("test", 100))
    assert [len(y) for _, y in batches] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([x for x, _ in batches]), digits.standardize(digits.test.inputs))
    assert torch.equal(torch.cat([y for _, y in batches]), digits.test.labels)


@pytest.mark.parametrize("limit", [None, 100])
def test_equal_classes_of_a_split_that_comes_class_by_class_are_gone_through_in_turns(digits, limit):
    """Whoever looks at the first few, or batch by batch, as batch norm does, sees all classes."""
    order = torch.cat([torch.nonzero(digits.test.labels == k).flatten()[:30] for k in range(10)])
    sorted_ = replace(digits, test=digits.test.take(order))
    batches = Batches(sorted_, "test", 20, limit)
    labels = torch.cat([y for _, y in batches])
    assert torch.equal(labels[:20], torch.arange(10).repeat(2))
    seen = torch.cat([x for x, _ in batches]).flatten(1)
    evenly = slice(None) if limit is None else torch.arange(limit) * len(order) // limit
    expected = digits.standardize(sorted_.test.inputs[evenly]).flatten(1)
    for k in range(10):  # each class in its own order
        assert torch.equal(seen[labels == k], expected[sorted_.test.labels[evenly] == k])
    mixed = torch.cat([y for _, y in Batches(digits, "test", 20)])
    assert torch.equal(mixed, digits.test.labels)


def test_unequal_classes_have_their_shares_of_every_batch(digits):
    zeros, ones = (torch.nonzero(digits.test.labels == k).flatten() for k in (0, 1))
    unequal = replace(digits, test=digits.test.take(torch.cat([zeros[:30], ones[:10]])))
    for _, y in Batches(unequal, "test", 8):
        assert y.sum() == 2


def test_a_generator_shuffles_by_randperm(digits):
    x, y = (torch.cat(part) for part in zip(*digits.batches("train", 100, generator=generator(7)), strict=True))
    order = torch.randperm(len(digits.train), generator=generator(7))
    assert torch.equal(x, digits.standardize(digits.train.inputs[order]))
    assert torch.equal(y, digits.train.labels[order])


def test_drop_last_leaves_out_the_rest(digits):
    assert [len(y) for _, y in digits.batches("test", 100, drop_last=True)] == [100] * 3
    assert [len(y) for _, y in digits.batches("test", 359, drop_last=True)] == [359]


def test_a_split_made_by_hand_is_batched(digits):
    some = digits.train.take(torch.tensor([5, 2, 9]))
    ((x, y),) = digits.batches(some, 8)
    assert torch.equal(x, digits.standardize(digits.train.inputs[[5, 2, 9]]))
    assert torch.equal(y, digits.train.labels[[5, 2, 9]])


def test_augmentation_changes_images_alone_and_before_they_are_standardized(digits):
    plain = list(digits.batches("train", 50, generator=generator()))
    moved = list(digits.batches("train", 50, generator=generator(), augment=Augment(shift=7)))
    assert all(torch.equal(y, z) for (_, y), (_, z) in zip(plain, moved, strict=True))
    assert not torch.equal(plain[0][0], moved[0][0])
    black = digits.standardize(torch.zeros(1, 1, 1, 1, dtype=torch.uint8)).item()
    x = torch.cat([x for x, _ in moved])
    assert x.min().item() == black
    assert (x == black).float().mean() > (torch.cat([x for x, _ in plain]) == black).float().mean() + 0.1


def test_each_pass_is_augmented_anew_and_repeats_under_its_seed(digits):
    def passes(seed):
        g = generator(seed)
        return [next(digits.batches("train", 50, generator=g, augment=Augment(shift=2)))[0] for _ in range(2)]

    first, second = passes(1)
    assert not torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(passes(1), (first, second), strict=True))


def test_the_generator_advances_alike_however_a_pass_is_used(digits):
    states = []
    for augment, taken in [(None, 0), (None, 99), (Augment(flip=True, crop=1), 3)]:
        g = generator()
        for _, _ in zip(range(taken), digits.batches("train", 50, generator=g, augment=augment), strict=False):
            pass
        states.append(g.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], generator().get_state())


def test_a_pass_leaves_the_global_generator_alone(digits):
    state = torch.get_rng_state()
    list(digits.batches("train", 200, generator=generator(), augment=Augment(flip=True, shift=1)))
    load("digits", label_noise=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_refuse_at_the_call(digits):
    with pytest.raises(InvalidInput, match=r"unknown split 'valid'.*validation"):
        digits.batches("valid", 10)
    for size in (0, -5, 2.5):
        with pytest.raises(InvalidInput, match=f"batch_size is {size}"):
            digits.batches("train", size)
    with pytest.raises(InvalidInput, match="without a generator"):
        digits.batches("train", 10, augment=Augment(flip=True))
    with pytest.raises(InvalidInput, match="nothing of 359 examples"):
        digits.batches("test", 360, drop_last=True)
    with pytest.raises(InvalidInput, match="images"):
        next(load("moons").batches("train", 10, generator=generator(), augment=Augment(flip=True)))


def test_split_checks_its_parts():
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    assert len(Split(images, labels)) == 3
    with pytest.raises(InvalidInput, match="labels are"):
        Split(images, labels[:2])
    with pytest.raises(InvalidInput, match="labels are"):
        Split(images, labels.int())
    with pytest.raises(InvalidInput, match="inputs are"):
        Split(images.float(), labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_batches(digits):
    there = load("digits", device="cuda")
    augment = Augment(flip=True, crop=1)
    for (x, y), (u, v) in zip(
        digits.batches("train", 100, generator=generator(), augment=augment),
        there.batches("train", 100, generator=generator(), augment=augment),
        strict=True,
    ):
        assert u.is_cuda
        assert v.is_cuda
        torch.testing.assert_close(u.cpu(), x)
        assert torch.equal(v.cpu(), y)


# torchvision's sets, from tiny files


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(folder):
    """20 training and 10 test images; image i of a part is filled with i, and labelled i % 10."""
    for part, n in (("train", 20), ("t10k", 10)):
        number = np.arange(n, dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", np.broadcast_to(number[:, None, None], (n, 28, 28)).copy())
        write_idx(folder / f"{part}-labels-idx1-ubyte", number % 10)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_read_where_torchvision_keeps_it(tmp_path, name, folder):
    write_mnist(tmp_path / folder / "raw")
    data = load(name, data_dir=tmp_path, validation=0.5)
    assert (data.classes, data.channels, data.size) == (10, 1, (28, 28))
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 10, 10)
    assert sorted(data.train.labels.tolist()) == sorted(data.validation.labels.tolist()) == list(range(10))
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.inputs[:, 0, 13, 7] % 10, split.labels)


class PickledIn2009:
    """Warns when it is unpickled, as some versions of NumPy do over the originals."""

    def __reduce__(self):
        return warnings.warn, ("dtype(): align should be passed as Python or NumPy boolean but got `align=0`.",)


@pytest.mark.parametrize(
    ("name", "folder", "parts", "key", "classes"),
    [
        ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels", 10),
        ("cifar100", "cifar-100-python", ["train", "test"], "fine_labels", 100),
    ],
)
def test_cifar_is_read_where_torchvision_keeps_it(tmp_path, monkeypatch, name, folder, parts, key, classes):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # ours are not the originals
    (tmp_path / folder).mkdir()
    planes = np.repeat(np.arange(3, dtype=np.uint8), 1024)  # red, green and blue planes of 0, 1 and 2
    planes.reshape(3, 32, 32)[:, 5, 9] += 100  # and a mark in row 5, column 9
    for part in parts:
        batch = {
            "data": np.stack([planes + 10 * i for i in range(4)]).astype(np.uint8),
            key: [3, 1, 0, 2],
            "old": PickledIn2009(),
        }
        (tmp_path / folder / part).write_bytes(pickle.dumps(batch))
    meta = {"label_names": ["?"] * 10, "fine_label_names": ["?"] * 100}
    for file in ("batches.meta", "meta"):
        (tmp_path / folder / file).write_bytes(pickle.dumps(meta))
    data = load(name, data_dir=tmp_path, validation=0)
    assert (data.classes, data.channels, data.size) == (classes, 3, (32, 32))
    assert data.test.inputs[:, :, 9, 5].tolist() == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]
    assert data.test.inputs[:, :, 5, 9].tolist() == [[10 * i + 100, 10 * i + 101, 10 * i + 102] for i in range(4)]
    assert data.test.labels.tolist() == [3, 1, 0, 2]
    assert len(data.train) == 4 * (len(parts) - 1)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_a_failed_download_says_what_to_do(tmp_path, name):
    with pytest.raises(InvalidInput, match=f"{name} .*{tmp_path}.*no network in tests.*--data-dir"):
        load(name, data_dir=tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"not an idx file"])
def test_damaged_files_are_named_by_their_set(tmp_path, damage):
    write_mnist(tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidInput, match=f"mnist .*{tmp_path}"):
        load("mnist", data_dir=tmp_path)


def test_a_constant_channel_is_standardized_to_zero(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    grey = np.full((20, 28, 28), 77, dtype=np.uint8)
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", grey)
    data = load("mnist", data_dir=tmp_path, validation=0.5)
    assert data.std.tolist() == [1.0]
    assert data.standardize(data.train.inputs).abs().max() < 1e-6
    assert data.standardize(data.test.inputs).isfinite().all()


@pytest.mark.parametrize("size", [5, 8, 20])
def test_image_size_resizes_the_sets_of_square_images(size):
    data, plain = load("digits", image_size=size), load("digits")
    assert data.size == (size, size)
    assert data.train.inputs.dtype == torch.uint8
    assert torch.equal(data.train.labels, plain.train.labels)
    assert data.mean.item() == pytest.approx(plain.mean.item(), rel=0.15)  # the margins weigh less, or more
    if size == 8:
        assert torch.equal(data.train.inputs, plain.train.inputs)


# Image folders


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Classes ant and bee, four training and two test images each, of 6 × 4; bee's are green, ant's red, numbered."""
    for part, n in (("train", 4), ("test", 2)):
        for channel, name in enumerate(("ant", "bee")):
            for i in range(n):
                pixels = torch.zeros(3, 6, 4, dtype=torch.uint8)
                pixels[channel] = 100 + i
                write_image(tmp_path / part / name / f"{i}.png", pixels)
    return tmp_path


def test_an_image_folder_is_read_by_class(folder):
    data = load(f"imagefolder:{folder}", validation=0.25)
    assert (data.name, data.classes, data.channels, data.size) == (f"imagefolder:{folder}", 2, 3, (6, 4))
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 4)
    assert sorted(data.validation.labels.tolist()) == [0, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.inputs[:, :, 2, 3].tolist() == [[100, 0, 0], [101, 0, 0], [0, 100, 0], [0, 101, 0]]
    assert data.std[2] == 1.0  # there is no blue
    assert data.standardize(data.train.inputs)[:, 2].abs().max() == 0


def test_grey_images_become_rgb(folder):
    write_image(folder / "test" / "ant" / "0.png", torch.full((1, 6, 4), 9, dtype=torch.uint8))
    assert load(f"imagefolder:{folder}").test.inputs[0].unique().tolist() == [9]


def test_images_of_two_sizes_need_an_image_size(folder):
    wide = torch.zeros(3, 4, 12, dtype=torch.uint8)
    wide[:, :, 4:8] = 200  # the centre square
    write_image(folder / "test" / "bee" / "wide.png", wide)
    with pytest.raises(InvalidInput, match=r"wide\.png is 4 × 12 pixels.*6 × 4.*--image-size"):
        load(f"imagefolder:{folder}")
    data = load(f"imagefolder:{folder}", image_size=4)
    assert data.size == (4, 4)
    assert data.test.inputs[-1].unique().tolist() == [200]
    assert load(f"imagefolder:{folder}", image_size=8).size == (8, 8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_corrupt_image_is_named(folder, suffix, left):
    path = folder / "train" / "bee" / f"bad{suffix}"
    write_image(path, torch.randint(0, 256, (3, 6, 4), generator=generator(), dtype=torch.uint8))
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(InvalidInput, match=rf"bad\{suffix}.*remove"):
        load(f"imagefolder:{folder}")


def remove(path):
    for child in path.iterdir():
        if child.is_dir():
            remove(child)
        else:
            child.unlink()
    path.rmdir()


def empty(path):
    remove(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda f: remove(f), ""),
        (lambda f: remove(f / "train"), "train"),
        (lambda f: remove(f / "test"), "test"),
        (lambda f: empty(f / "train"), "train"),
        (lambda f: empty(f / "test"), "test"),
        (lambda f: empty(f / "train" / "bee"), "train/bee"),
        (lambda f: empty(f / "test" / "ant"), "test/ant"),
        (lambda f: remove(f / "test" / "bee"), "test"),
        (lambda f: (f / "train" / "cow").mkdir(), "train"),
    ],
)
@pytest.mark.parametrize("use", [check_name, load])
def test_a_bad_image_folder_is_named(folder, spoil, names, use):
    check_name(f"imagefolder:{folder}")
    spoil(folder)
    with pytest.raises(InvalidInput) as caught:
        use(f"imagefolder:{folder}")
    assert str(folder / names) in str(caught.value)


# Names and settings


def test_names():
    for name in NAMES:
        check_name(name)
    for name in ("imagenet", "imagefolder", "", "MNIST"):
        with pytest.raises(InvalidInput, match=r"digits, mnist, .*imagefolder:PATH"):
            check_name(name)
    with pytest.raises(InvalidInput, match="names no folder"):
        check_name("imagefolder:")
    with pytest.raises(InvalidInput, match="choose from"):
        load("imagenet")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("validation", 1.0),
        ("validation", -0.1),
        ("validation", float("nan")),
        ("validation", 1e-5),
        ("label_noise", 1.01),
        ("label_noise", -0.01),
        ("label_noise", float("nan")),
        ("seed", -1),
        ("seed", 0.5),
        ("image_size", 0),
        ("image_size", 2.5),
        ("image_size", 28),
        ("device", "cuda:77"),
        ("device", "gpu"),
    ],
)
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(InvalidInput):
        load("moons", **{setting: value})
