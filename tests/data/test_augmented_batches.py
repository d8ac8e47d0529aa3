"""Batches with mixed examples and with repeated ones."""

import pytest
import torch

from resode.data import Augment, DataSet, Split, load
from resode.errors import InvalidInput


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def numbers():
    """100 images of constant colours 1 … 100, each its own class."""
    images = torch.arange(1, 101, dtype=torch.uint8)[:, None, None, None].expand(100, 1, 6, 6).contiguous()
    split = Split(images, torch.arange(100))
    return DataSet("numbers", split, split, split, 100, torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("augment", [Augment(mixup=0.5), Augment(cutmix=0.5), Augment(flip=True, mixup=1, cutmix=1)])
def test_mixed_batches_carry_the_mean_of_the_images_in_their_shares(numbers, augment):
    """Each image's mean colour is that of the classes by their shares: with every kind of mixing."""
    batches = list(numbers.batches("train", 20, generator=generator(), augment=augment))
    assert len(batches) == 5
    colours = torch.arange(1, 101) / 255
    for x, shares in batches:
        assert shares.shape == (20, 100)
        torch.testing.assert_close(x.mean((1, 2, 3)), shares @ colours)
        torch.testing.assert_close(shares.sum(1), torch.ones(20))
    assert any((shares.max(1).values < 0.999).any() for _, shares in batches)


def test_mixing_leaves_the_order_and_the_other_draws_as_they_were(digits):
    plain = digits.batches("train", 50, generator=generator(), augment=Augment(flip=True, shift=1))
    mixed = digits.batches("train", 50, generator=generator(), augment=Augment(flip=True, shift=1, mixup=1e-9))
    (x, labels), (y, shares) = next(plain), next(mixed)
    # At α → 0 the share is 0 or 1: each image is itself, or another of the batch.
    assert {tuple(z.flatten().tolist()) for z in x} == {tuple(z.flatten().tolist()) for z in y}
    assert sorted(shares.argmax(1).tolist()) == sorted(labels.tolist())


def test_points_can_be_mixed():
    data = load("moons")
    for x, shares in data.batches("train", 100, generator=generator(), augment=Augment(mixup=1.0)):
        assert x.shape == (100, 2)
        assert shares.shape == (100, 2)


def test_points_without_augmentation_are_as_before():
    data = load("moons")
    one, other = (
        list(data.batches("train", 100, generator=generator(), augment=augment)) for augment in (None, Augment())
    )
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True))
    assert one[0][1].dtype == torch.int64


@pytest.mark.parametrize("repeats", [2, 4])
def test_repeats_show_fewer_images_more_often_in_as_many_batches(numbers, repeats):
    epochs, g = [], generator()
    for _ in range(2):
        batches = list(numbers.batches("train", 8, generator=g, repeats=repeats, drop_last=True))
        assert [len(labels) for _, labels in batches] == [8] * 12
        for x, labels in batches:
            count = torch.bincount(labels)
            assert set(count.tolist()) == {0, repeats}
            torch.testing.assert_close(x[:, 0, 0, 0] * 255, labels + 1.0)
        epochs.append(torch.cat([labels for _, labels in batches]))
    seen = [set(labels.tolist()) for labels in epochs]
    assert [len(s) for s in seen] == [96 // repeats] * 2
    assert seen[0] != seen[1]


def test_repeats_take_the_first_of_the_same_order(numbers):
    plain = torch.cat([labels for _, labels in numbers.batches("train", 8, generator=generator())])
    repeated = torch.cat([labels for _, labels in numbers.batches("train", 8, generator=generator(), repeats=2)])
    assert torch.equal(repeated, plain[:50].repeat_interleave(2))


def test_repeats_are_augmented_each_by_itself():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(40, -1, -1, -1).contiguous()
    split = Split(images, torch.arange(40))
    data = DataSet("alike", split, split, split, 40, torch.zeros(1), torch.ones(1))
    augment = Augment(shift=3)
    x = torch.cat([x for x, _ in data.batches("train", 8, generator=generator(), augment=augment, repeats=2)])
    same = (x[0::2] == x[1::2]).flatten(1).all(1)
    assert same.float().mean() < 0.3  # of 49 places


def test_bad_repeats_and_a_missing_epoch_are_refused_at_the_call(numbers):
    with pytest.raises(InvalidInput, match="repeats is 3, and batch_size 8"):
        numbers.batches("train", 8, generator=generator(), repeats=3)
    for repeats in (0, 1.5):
        with pytest.raises(InvalidInput, match=f"repeats is {repeats}"):
            numbers.batches("train", 8, generator=generator(), repeats=repeats)
    with pytest.raises(InvalidInput, match="repeats without a generator"):
        numbers.batches("train", 8, repeats=2)
    with pytest.raises(InvalidInput, match="pass epoch"):
        numbers.batches("train", 8, generator=generator(), augment=Augment(alternate_flip=True))
    with pytest.raises(InvalidInput, match="without a generator"):
        numbers.batches("train", 8, augment=Augment(mixup=1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_mixed_batches(digits):
    augment = Augment(flip=True, rotate=15.0, brightness=0.3, cutout=2, erase=0.5, mixup=0.5, cutmix=0.5)
    there = load("digits", device="cuda")
    here, away = (d.batches("train", 100, generator=generator(), augment=augment, repeats=2) for d in (digits, there))
    for (x, shares), (u, theirs) in zip(here, away, strict=True):
        torch.testing.assert_close(u.cpu(), x, rtol=0, atol=0.02)  # a level of grey may be rounded the other way
        torch.testing.assert_close(theirs.cpu(), shares)
