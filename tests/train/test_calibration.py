"""The expected calibration error against its definition, sample by sample."""

import math

import pytest
import torch

from resode import InvalidInput
from resode.train.calibration import expected_calibration_error


def naive(probabilities, labels, bins):
    """Guo et al. 2017, eq. 3, with a list for each bin."""
    members = [[] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        place = next(m for m in range(bins) if m / bins < confidence <= (m + 1) / bins)
        members[place].append((confidence, row.index(confidence) == label))
    error = 0.0
    for inside in members:
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(sure for sure, _ in inside) / len(inside)
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_it_is_the_sum_over_the_bins(bins):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(200, 5, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    labels = torch.randint(5, (200,), generator=generator)
    found = expected_calibration_error(probabilities, labels, bins)
    assert found == pytest.approx(naive(probabilities, labels, bins), rel=1e-12)
    assert 0.1 < found < 1.0
    assert expected_calibration_error(probabilities.float(), labels, bins) == pytest.approx(found, rel=1e-5)


def test_bins_are_closed_above():
    # Of 4 bins, 0.5 and 0.4 both belong to (0.25, 0.5], where the excess of one and the lack of the other cancel.
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]])
    error = expected_calibration_error(probabilities, torch.tensor([0, 1]), 4)
    assert error == pytest.approx(abs((1 - 0.5) + (0 - 0.4)) / 2)
    assert expected_calibration_error(probabilities, torch.tensor([0, 1]), 9) == pytest.approx((0.5 + 0.4) / 2)


@pytest.mark.parametrize(("right", "error"), [(8, 0.0), (10, 0.2), (0, 0.8)])
def test_sure_to_80_percent(right, error):
    probabilities = torch.tensor([[0.8, 0.1, 0.1]]).expand(10, 3)
    labels = torch.tensor([0] * right + [1] * (10 - right))
    assert expected_calibration_error(probabilities, labels) == pytest.approx(error, abs=1e-7)


def test_a_net_that_is_quite_sure_and_right_is_calibrated():
    assert expected_calibration_error(torch.eye(4), torch.arange(4)) == 0.0
    assert expected_calibration_error(torch.eye(4), torch.arange(4).roll(1)) == 1.0


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "says"),
    [
        (torch.eye(3), torch.arange(2), 15, r"\(3, 3\) and labels of shape \(2,\)"),
        (torch.ones(3), torch.arange(3), 15, r"\(N, K\) and \(N,\)"),
        (torch.ones(0, 3), torch.zeros(0), 15, "N of at least 1"),
        (torch.randn(3, 3), torch.arange(3), 15, "after the softmax"),
        (torch.full((3, 3), math.nan), torch.arange(3), 15, "after the softmax"),
        (torch.eye(3), torch.arange(3), 0, "bins is 0"),
    ],
)
def test_what_is_no_probability_is_refused(probabilities, labels, bins, says):
    with pytest.raises(InvalidInput, match=says):
        expected_calibration_error(probabilities, labels, bins)
