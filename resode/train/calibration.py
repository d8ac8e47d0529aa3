"""Calibration: whether a net that is sure to 80% is right 8 times of 10."""

import torch
from torch import Tensor

from resode.data.dataset import check_whole
from resode.errors import InvalidInput


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE = Σ_m |B_m|/N · |acc(B_m) − conf(B_m)| (Guo et al. 2017, arXiv 1706.04599, eq. 3; Naeini et al. 2015).

    The confidence of an answer is the largest of the probabilities. B_m are the samples whose confidence lies in
    ((m − 1)/M, m/M], M = ``bins``; acc(B_m) is their share of right answers and conf(B_m) their mean confidence.

    Args:
        probabilities: (N, K), each row sums to 1.
        labels: (N,), from 0 to K − 1.

    Returns:
        A share in [0, 1]; 0 for a net that is calibrated (on these bins).

    Raises:
        InvalidInput: for shapes that do not fit, no samples, rows that are no probabilities, or no bins.
    """
    check_whole(bins, "bins")
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise InvalidInput(
            f"probabilities of shape {tuple(probabilities.shape)} and labels of shape {tuple(labels.shape)}: (N, K) "
            "and (N,) with N of at least 1 are expected"
        )
    rows = probabilities.double()
    if not ((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise InvalidInput("the rows of the probabilities do not sum to 1: give them after the softmax, and not logits")
    confidence, answer = rows.max(1)
    # The bounds are closed above: a confidence of 1 belongs to the last bin.
    place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    excess = (answer == labels).double() - confidence
    per_bin = torch.zeros(bins, dtype=torch.float64, device=rows.device).index_add(0, place, excess)
    return float(per_bin.abs().sum()) / len(labels)
