"""Dropout: how often each position is dropped, what is dropped together, and what training and evaluation expect."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resode.errors import InvalidInput
from resode.layers.dropout import MASKS, Dropout, cutout_mask, dropout

KINDS = tuple(MASKS)
SIZES = [(8, 8), (5, 3), (1, 7), (7, 1), (2, 9)]


def dropped(kind, p, shape):
    """Which positions of a batch of ones a training pass drops: boolean, of ``shape``."""
    torch.manual_seed(0)
    return dropout(torch.ones(shape), p, kind) == 0.0


def check_share(hits, n, p, sigmas=5.0):
    """``hits`` out of ``n`` independent draws each: within ``sigmas`` deviations of p at every position."""
    deviation = (hits - n * p).abs() / math.sqrt(n * p * (1 - p))
    assert deviation.max() < sigmas, f"{float(deviation.max()):.1f} deviations off"


# --- how often -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_position_is_dropped_with_probability_p(kind, p):
    n = 10_000
    check_share(dropped(kind, p, (n, 3, 4, 4)).sum(0).double(), n, p)


@pytest.mark.parametrize(
    ("kind", "independent"), [("unit", (400, 8, 8, 8)), ("spatial", (2000, 100)), ("path", (200_000,))]
)
def test_the_dropped_share_of_many_draws_is_p(kind, independent):
    shape = (*independent, *(1 for _ in range(4 - len(independent))))
    drop = dropped(kind, 0.3, shape)
    check_share(drop.sum().double(), drop.numel(), 0.3, sigmas=4.5)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.37, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("size", SIZES)
def test_cutout_drops_every_pixel_equally_corners_included(size, p):
    n = 20_000
    check_share(dropped("cutout", p, (n, 1, *size)).sum((0, 1)).double(), n, p)


class Places:
    """In the place of torch.rand: every placement in turn, and every rounding of the width, on an even grid."""

    def __init__(self, height, width, roundings=200):
        rounding = [(i + 0.5) / roundings for i in range(roundings)]
        rows = [(i + 0.5) / height for i in range(height)]
        columns = [(i + 0.5) / width for i in range(width)]
        self.draws = torch.tensor(list(itertools.product(rounding, rows, columns)), dtype=torch.float64).T
        self.count = self.draws.shape[1]

    def __call__(self, *shape, **kwargs):
        assert shape == self.draws.shape
        return self.draws


@pytest.mark.parametrize("p", [0.005, 0.1, 0.25, 0.5, 0.55, 0.66, 0.99])
@pytest.mark.parametrize("size", SIZES)
def test_cutout_by_counting_over_all_placements(size, p, monkeypatch):
    places = Places(*size)
    monkeypatch.setattr(torch, "rand", places)
    share = 1.0 - cutout_mask(torch.ones(places.count, 1, *size), p).mean((0, 1))
    assert torch.all(share == share[0, 0])
    assert abs(float(share[0, 0]) - p) <= 0.5 / 200  # the roundings are on a grid of 200


@given(p=st.floats(0.0, 0.999), h=st.integers(1, 12), w=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_cutout_drops_a_rectangle_on_the_torus(p, h, w):
    masks = cutout_mask(torch.ones(8, 3, h, w), p)
    assert masks.shape == (8, 1, h, w)
    for drop in (masks[:, 0] == 0).unbind():
        rows, columns = drop.any(1), drop.any(0)
        assert torch.equal(drop, rows[:, None] & columns[None, :])
        for side in (rows, columns):
            assert (side != side.roll(1)).sum() <= 2, "one arc of the circle"
        assert abs(float(drop.sum()) - p * h * w) <= max(h, w), "the area is p·H·W up to a row or column"


def test_cutout_wraps_around_every_border():
    drop = dropped("cutout", 0.25, (2000, 1, 8, 8))[:, 0]
    for side in (drop.any(2), drop.any(1)):
        assert (side[:, 0] & side[:, -1] & ~side.all(1)).any()


# --- what is dropped together ----------------------------------------------------------------------------------------


def test_spatial_drops_whole_channels():
    drop = dropped("spatial", 0.5, (50, 20, 4, 3)).flatten(2)
    assert torch.equal(drop.any(2), drop.all(2))
    assert 0 < drop.all(2).double().mean() < 1


def test_path_drops_whole_samples():
    drop = dropped("path", 0.5, (200, 5, 4, 3)).flatten(1)
    assert torch.equal(drop.any(1), drop.all(1))
    assert 0 < drop.all(1).double().mean() < 1


def test_cutout_drops_the_same_pixels_in_every_channel_and_others_in_every_sample():
    drop = dropped("cutout", 0.3, (50, 5, 8, 8))
    assert torch.equal(drop, drop[:, :1].expand_as(drop))
    assert len({tuple(d.flatten().tolist()) for d in drop[:, 0]}) > 20


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("unit", ((0, 0, 0, 0), (0, 0, 0, 1))),
        ("unit", ((0, 0, 0, 0), (0, 1, 0, 0))),
        ("spatial", ((0, 0, 0, 0), (0, 1, 0, 0))),
        ("spatial", ((0, 0, 0, 0), (1, 0, 0, 0))),
        ("path", ((0, 0, 0, 0), (1, 0, 0, 0))),
        ("cutout", ((0, 0, 0, 0), (1, 0, 0, 0))),
    ],
)
def test_what_is_not_dropped_together_is_dropped_independently(kind, pair):
    n = 20_000
    drop = dropped(kind, 0.4, (2 * n, 2, 2, 2)).view(n, 2, 2, 2, 2)
    both = drop[(slice(None), *pair[0])] & drop[(slice(None), *pair[1])]
    check_share(both.sum().double(), n, 0.16)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors(kind):
    n = 20_000
    drop = dropped(kind, 0.4, (n, 6))
    assert drop.shape == (n, 6)
    check_share(drop.sum(0).double(), n, 0.4)
    if kind == "path":
        assert torch.equal(drop.any(1), drop.all(1))
    elif kind == "cutout":
        assert ((drop != drop.roll(1, 1)).sum(1) <= 2).all(), "an arc of the coordinates"
    else:
        check_share((drop[:, 0] & drop[:, 1]).sum().double(), n, 0.16)


# --- expectations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_expects_what_evaluation_gives(kind, inverted, p):
    torch.manual_seed(0)
    layer, n = Dropout(p, kind, inverted), 40_000
    x = torch.rand(1, 2, 3, 3, dtype=torch.float64) + 1.0
    trained = layer(x.expand(n, -1, -1, -1))
    assert torch.isfinite(trained).all()
    kept = x / (1 - p) if inverted else x
    assert torch.allclose(trained.amax(0, keepdim=True), kept)
    error = 5.0 * kept * math.sqrt(p * (1 - p) / n)
    assert ((trained.mean(0) - layer.eval()(x)).abs() < error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_identity_or_scales(kind):
    x = torch.randn(4, 3, 5, 5)
    assert Dropout(0.4, kind).eval()(x) is x
    torch.testing.assert_close(Dropout(0.4, kind, inverted=False).eval()(x), 0.6 * x)
    torch.testing.assert_close(dropout(x, 0.4, kind, training=False), x)
    torch.testing.assert_close(dropout(x, 0.4, kind, training=False, inverted=False), 0.6 * x)


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_p_of_zero_changes_nothing(kind, inverted):
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(Dropout(0.0, kind, inverted)(x), x)
    assert torch.equal(dropout(x, 0.0, kind, inverted=inverted), x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_mask(kind):
    x = torch.rand(8, 3, 5, 5, dtype=torch.float64) + 1.0
    x.requires_grad_()
    out = Dropout(0.4, kind)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())
    assert set(x.grad.unique().tolist()) <= {0.0, 1 / 0.6}


def test_each_call_draws_anew_and_the_seed_decides():
    x, layer = torch.ones(4, 3, 8, 8), Dropout(0.5, "unit")
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_type_is_kept(kind, dtype):
    assert Dropout(0.5, kind)(torch.ones(4, 3, 8, 8, dtype=dtype)).dtype == dtype


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_p_outside_its_range_is_refused(p):
    for refuse in (lambda: Dropout(p), lambda: dropout(torch.ones(2, 3), p)):
        with pytest.raises(InvalidInput, match=r"probability in \[0, 1\)"):
            refuse()


@pytest.mark.parametrize("kind", ["units", "dropconnect"])
def test_an_unknown_kind_is_refused_with_the_choices(kind):
    for refuse in (lambda: Dropout(0.5, kind), lambda: dropout(torch.ones(2, 3), 0.5, kind)):
        with pytest.raises(InvalidInput, match="unit, spatial, cutout, path"):
            refuse()


def test_repr_says_what_it_is():
    assert repr(Dropout(0.5, "cutout", inverted=False)) == "Dropout(p=0.5, kind='cutout', inverted=False)"
