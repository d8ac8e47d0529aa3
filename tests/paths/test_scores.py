"""Errors, losses and their intervals against scipy and numpy."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, binomtest, norm

from resode import InvalidInput
from resode.paths.scores import Score, Tallies, wilson


def tallied(logits, labels, sizes=None, by_class=False):
    """The scores of networks with these logits (N, B, C), the batch cut into ``sizes``."""
    tallies = Tallies(len(logits), by_class)
    for part, own in zip(logits.split(sizes or logits.shape[1], 1), labels.split(sizes or len(labels)), strict=True):
        tallies.begin(own, part.shape[2])
        for i, network in enumerate(part):
            tallies.add(i, network, own)
    return tallies.scores()


def drawn(networks, count, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.randn(networks, count, classes, generator=generator, dtype=dtype), labels


# The interval of the error


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_the_error_is_wilsons(counts):
    wrong, count = counts
    expected = binomtest(wrong, count).proportion_ci(0.95, method="wilson")
    low, high = wilson(wrong, count)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)
    assert 0.0 <= low <= wrong / count <= high <= 1.0


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_it_covers_the_true_error_95_times_of_100(p):
    n = 400
    covered = [k for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]]
    assert 0.935 < float(binom.pmf(covered, n, p).sum()) < 0.975


# The interval of the loss


def test_the_interval_of_the_loss_is_that_of_a_mean():
    logits, labels = drawn(3, 50, 4)
    for network, score in zip(logits, tallied(logits, labels), strict=True):
        losses = F.cross_entropy(network, labels, reduction="none").numpy()
        half = norm.ppf(0.975) * losses.std(ddof=1) / math.sqrt(50)
        assert score.loss == pytest.approx(losses.mean(), rel=1e-13)
        assert score.loss_interval == pytest.approx((losses.mean() - half, losses.mean() + half), rel=1e-11)


def test_it_covers_the_true_loss_95_times_of_100():
    # Of logits (a, 0) with a normal and the first class right, the loss is log(1 + exp(−a)).
    networks, count = 600, 300
    a = torch.randn(networks, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = tallied(torch.stack([a, torch.zeros_like(a)], 2), torch.zeros(count, dtype=torch.int64))
    true, _ = quad(lambda a: np.log1p(np.exp(-a)) * norm.pdf(a), -12, 12)
    share = np.mean([score.loss_interval[0] <= true <= score.loss_interval[1] for score in scores])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / networks)


def test_of_one_sample_nothing_is_known_of_the_spread():
    logits, labels = drawn(1, 1, 3)
    (score,) = tallied(logits, labels)
    assert score.loss_interval == (score.loss, score.loss)
    assert score.error_interval == wilson(round(score.error), 1)


# Sums over batches


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 100))
def test_batches_of_any_sizes_add_up_to_the_whole(sizes, seed):
    logits, labels = drawn(3, sum(sizes), 4, seed)
    for whole, parts in zip(
        tallied(logits, labels, by_class=True), tallied(logits, labels, sizes, by_class=True), strict=True
    ):
        assert (parts.count, parts.error, parts.error_interval) == (whole.count, whole.error, whole.error_interval)
        assert parts.by_class == whole.by_class
        assert parts.loss == pytest.approx(whole.loss, rel=1e-13)
        assert parts.loss_interval == pytest.approx(whole.loss_interval, rel=1e-8)


def test_an_empty_batch_adds_nothing():
    logits, labels = drawn(2, 5, 3)
    assert tallied(logits, labels, [0, 5, 0]) == tallied(logits, labels)


def test_the_error_of_each_class_is_that_of_its_samples():
    logits, labels = drawn(4, 60, 5)
    labels[labels == 2] = 3  # no sample of the third class
    for network, score in zip(logits, tallied(logits, labels, [25, 35], by_class=True), strict=True):
        wrong = network.argmax(1) != labels
        expected = [float(wrong[labels == c].double().mean()) if c != 2 else None for c in range(5)]
        assert list(score.by_class) == expected
        counts = labels.bincount(minlength=5).tolist()
        total = sum(error * m for error, m in zip(score.by_class, counts, strict=True) if m)
        assert total == pytest.approx(score.error * score.count)
    assert tallied(logits, labels)[0].by_class is None


def test_losses_are_summed_in_double_precision():
    logits, labels = drawn(1, 3, 4)
    (score,) = tallied(logits + 1e6, labels)
    assert score.loss == pytest.approx(float(F.cross_entropy(logits[0], labels)), rel=1e-9)
    (half,) = tallied(logits.bfloat16(), labels)
    assert half.loss == pytest.approx(float(F.cross_entropy(logits[0].bfloat16().double(), labels)), rel=1e-13)


def test_sums_go_on_another_day_to_the_same_numbers():
    logits, labels = drawn(3, 20, 4)
    expected = tallied(logits, labels, [7, 13], by_class=True)
    first, second = Tallies(3, by_class=True), Tallies(3, by_class=True)
    for tallies, part in ((first, slice(0, 7)), (second, slice(7, 20))):
        if tallies is second:
            second.restore(json.loads(json.dumps(first.state())), "cpu")
        tallies.begin(labels[part], 4)
        for i in range(3):
            tallies.add(i, logits[i, part], labels[part])
    assert second.scores() == expected


def test_before_any_batch_the_state_is_empty_and_there_are_no_scores():
    tallies = Tallies(2)
    again = Tallies(2)
    again.restore(json.loads(json.dumps(tallies.state())), "cpu")
    with pytest.raises(InvalidInput, match="there is none"):
        again.scores()


# What is no answer


def test_an_answer_that_is_no_number_is_wrong_whatever_its_label():
    logits, labels = drawn(1, 6, 3)
    logits[0, 1] = float("nan")
    labels[1] = 0  # the largest of NaNs is the first
    logits[0, 4, labels[4]] = float("nan")
    (score,) = tallied(logits, labels, by_class=True)
    right = sum(int(logits[0, i].argmax() == labels[i]) for i in (0, 2, 3, 5))
    assert score.error == pytest.approx(1 - right / 6)
    assert math.isnan(score.loss)


def test_infinite_losses_stay_infinite():
    logits, labels = drawn(1, 4, 3)
    logits[0, 2, labels[2]] = -float("inf")
    (score,) = tallied(logits, labels)
    assert score.loss == math.inf


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_classes_of_the_network_are_refused(label):
    logits, labels = drawn(1, 4, 3)
    labels[2] = label
    with pytest.raises(InvalidInput, match=r"labels go from .* classes 0 … 2"):
        tallied(logits, labels)


def test_a_score_survives_json():
    logits, labels = drawn(1, 9, 3)
    for by_class in (False, True):
        (score,) = tallied(logits, labels, by_class=by_class)
        assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
