"""MixUp and CutMix: images and labels mixed by the same share, drawn as the papers say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.data import Augment, cutmix, mixup
from resode.errors import InvalidInput


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flags(n, size=(7, 9)):
    """n images, each of its own constant colour i + 1, and labels i: a class for each image."""
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 2, *size)
    return images, torch.arange(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_mixup_is_its_equation(dtype, channels):
    x = torch.randint(0, 256, (16, channels, 5, 6), generator=generator(), dtype=torch.uint8).to(dtype)
    labels = torch.randint(0, 4, (16,), generator=generator())
    out, shares = Augment(mixup=0.7).mix(x, labels, 4, generator(3))
    draw = mixup(x, 0.7, generator(3))
    assert 0 < draw.share < 1
    assert sorted(draw.partner.tolist()) == list(range(16))
    assert shares.dtype == torch.float32
    assert out.dtype == dtype
    for i, j in enumerate(draw.partner.tolist()):
        expected = draw.share * x[i].double() + (1 - draw.share) * x[j].double()
        torch.testing.assert_close(out[i].double(), expected, rtol=1e-6, atol=0.51 if dtype == torch.uint8 else 1e-6)
        wanted = [draw.share * (labels[i] == k) + (1 - draw.share) * (labels[j] == k) for k in range(4)]
        torch.testing.assert_close(shares[i], torch.tensor(wanted))


def test_mixup_takes_points():
    points, labels = torch.randn(6, 2, generator=generator()), torch.tensor([0, 1] * 3)
    out, shares = Augment(mixup=1.0).mix(points, labels, 2, generator())
    draw = mixup(points, 1.0, generator())
    torch.testing.assert_close(out, draw.share * points + (1 - draw.share) * points[draw.partner])
    assert shares.shape == (6, 2)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_has_the_moments_of_beta(alpha):
    """Mean ½ and variance 1/(4(2α + 1))."""
    x, g, n = torch.zeros(2, 1, 4, 4), generator(), 3000
    share = torch.tensor([mixup(x, alpha, g).share for _ in range(n)], dtype=torch.float64)
    assert abs(share.mean() - 0.5) < 4 * share.std() / math.sqrt(n)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.1, 1.0]))
def test_cutmix_gives_labels_the_areas_that_are_seen(seed, n, height, width, alpha):
    images, labels = flags(n, (height, width))
    out, shares = Augment(cutmix=alpha).mix(images, labels, n, generator(seed))
    for i in range(n):
        seen = torch.stack([(out[i, 0] == k + 1).float().mean() for k in range(n)])
        torch.testing.assert_close(shares[i], seen, rtol=0, atol=1e-6)
    assert torch.equal(out[:, 0], out[:, 1])


def test_the_box_is_that_of_the_paper():
    """H√(1 − λ) × W√(1 − λ) about a centre in the frame, clipped: uniform over the places, from λ's own draws."""
    height, width, n = 8, 12, 3000
    g, seen = generator(), torch.zeros(height, width)
    for _ in range(n):
        draw = cutmix(torch.zeros(2, 1, height, width), 1.0, g)
        rows, columns, top, left = draw.box
        assert 0 <= top <= top + rows <= height
        assert 0 <= left <= left + columns <= width
        assert draw.share == pytest.approx(1 - rows * columns / (height * width))
        seen[top : top + rows, left : left + columns] += 1
    # What the mean over λ ~ U(0, 1) and over the centres makes of each pixel.
    expected = torch.zeros(height, width, dtype=torch.float64)
    grid = 400
    for step in range(grid):
        side = math.sqrt(1 - (step + 0.5) / grid)
        covered = []
        for frame in (height, width):
            length = int(frame * side)
            start = torch.arange(frame)[:, None] - length // 2
            place = torch.arange(frame)
            covered.append(((place >= start) & (place < start + length)).double().mean(0))
        expected += covered[0][:, None] * covered[1][None, :] / grid
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((seen / n - expected).abs() < 4.5 * deviation + 1e-3).all()


def test_with_both_each_has_half_of_the_batches():
    augment, g, n = Augment(mixup=0.8, cutmix=1.0), generator(), 2000
    images, _ = flags(4)
    cut = sum(augment.draw_mix(images, g).box is not None for _ in range(n))
    assert abs(cut - n / 2) < 4 * math.sqrt(n) / 2


@pytest.mark.parametrize("settings_of", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_the_generator_alone_decides_and_nothing_is_changed_in_place(settings_of):
    images, labels = flags(20)
    before, state = images.clone(), torch.get_rng_state()
    augment = Augment(**settings_of)
    assert augment.mixes
    one = augment.mix(images, labels, 20, generator(1))
    torch.rand(3)
    same = augment.mix(images, labels, 20, generator(1))
    torch.set_rng_state(state)
    other = augment.mix(images, labels, 20, generator(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[1], other[1])
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_mixing_the_shares_are_the_labels():
    images, labels = flags(5)
    augment = Augment(flip=True)
    out, shares = augment.mix(images, labels, 6, generator())
    assert not augment.mixes
    assert out is images
    assert torch.equal(shares, torch.eye(6)[:5])


def test_an_empty_batch_stays_empty():
    for augment in (Augment(mixup=1.0), Augment(cutmix=1.0)):
        out, shares = augment.mix(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), 3, generator())
        assert (out.shape, shares.shape) == ((0, 3, 4, 4), (0, 3))


@pytest.mark.parametrize("augment", [Augment(mixup=1.0), Augment(cutmix=1.0), Augment(flip=True)])
@pytest.mark.parametrize(("bad", "says"), [(4, "labels go from 0 to 4, and"), (-1, "labels go from -1 to 3, and")])
def test_labels_that_are_no_classes_are_refused(augment, bad, says):
    images, labels = flags(4)
    augment.mix(images, labels, 4, generator())
    labels = torch.where(labels == (3 if bad > 0 else 0), bad, labels)
    with pytest.raises(InvalidInput, match=rf"{says} there are 4 classes: .* 0 … 3; count the classes from 0"):
        augment.mix(images, labels, 4, generator())


def test_bad_input_is_refused():
    images, labels = flags(4)
    for bad in (labels[:3], labels.float()):
        with pytest.raises(InvalidInput, match=r"labels are .* int64 of shape \(4,\)"):
            Augment(mixup=1.0).mix(images, bad, 4)
    with pytest.raises(InvalidInput, match=r"shape \(4, 2\)"):
        Augment(cutmix=1.0).mix(torch.zeros(4, 2), labels, 4)
