"""The alternating flip: each image and its mirror in turn."""

import pytest
import torch

from resode.data import Augment, DataSet, Split, alternating_flip
from resode.errors import InvalidInput

IMAGE = torch.arange(1, 7, dtype=torch.uint8).reshape(1, 1, 2, 3)


def mirrored(index, epoch):
    out = alternating_flip(IMAGE.expand(len(index), -1, -1, -1), index, epoch)
    same, other = ((out == image).flatten(1).all(1) for image in (IMAGE, IMAGE.flip(-1)))
    assert (same ^ other).all()
    return other


def test_every_image_is_mirrored_in_every_other_epoch():
    index = torch.arange(500)
    first = mirrored(index, 0)
    for epoch in range(1, 5):
        assert torch.equal(mirrored(index, epoch), first ^ bool(epoch % 2))


@pytest.mark.parametrize("step", [1, 2, 10, 4096])
def test_a_coin_for_each_image_decides_the_first_epoch(step):
    """Half of the images, and half of the neighbours alike, at whatever distance."""
    coins = mirrored(step * torch.arange(4000), 0).float()
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs((coins[1:] == coins[:-1]).float().mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_an_image_has_its_coin_wherever_it_stands_in_a_batch():
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mirrored(order, 3), mirrored(torch.arange(300), 3)[order])


def test_the_hash_is_murmur_s():
    """The finalizer, in Python's whole numbers, which do not overflow."""

    def finalizer(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    index = torch.arange(1000) * 2147483
    assert mirrored(index, 0).tolist() == [finalizer(i % 2**32) % 2 == 1 for i in index.tolist()]


def test_it_takes_the_place_of_the_random_flip_and_draws_nothing():
    images, index = IMAGE.expand(50, -1, -1, -1), torch.arange(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        out = Augment(alternate_flip=True)(images, generator, index=index, epoch=1)
        assert torch.equal(out, alternating_flip(images, index, 1))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_two_epochs_of_a_data_set_show_each_image_and_its_mirror():
    images = torch.arange(1, 40 * 6 + 1, dtype=torch.uint8).reshape(40, 1, 2, 3)
    split = Split(images, torch.arange(40))
    data = DataSet("numbers", split, split, split, 40, torch.zeros(1), torch.ones(1))
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for epoch in (4, 5):
        for x, _ in data.batches("train", 8, generator=generator, augment=Augment(alternate_flip=True), epoch=epoch):
            seen |= {tuple(image) for image in (255 * x).round().long().flatten(1).tolist()}
    assert seen == {tuple(image.flatten().tolist()) for image in torch.cat([images, images.flip(-1)])}


def test_index_and_epoch_are_needed():
    for epoch in (None, -1, 1.5):
        with pytest.raises(InvalidInput, match=f"epoch is {epoch}"):
            alternating_flip(IMAGE, torch.arange(1), epoch)
    for index in (None, torch.arange(2), torch.zeros(1)):
        with pytest.raises(InvalidInput, match=r"index is .*shape \(1,\)"):
            alternating_flip(IMAGE, index, 0)
    with pytest.raises(InvalidInput, match="index is None"):
        Augment(alternate_flip=True)(IMAGE, epoch=0)


def test_at_random_and_by_turns_are_not_both_possible():
    with pytest.raises(InvalidInput, match="flip and alternate_flip are both on"):
        Augment(flip=True, alternate_flip=True)
