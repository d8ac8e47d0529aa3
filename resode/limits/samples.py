"""The data that the parts of a certificate share: some samples, in batches that can be gone through again."""

from collections.abc import Iterable

import torch
from torch import Tensor

from resode.blocks.settings import check_count
from resode.errors import InvalidInput

Data = Iterable[tuple[Tensor, Tensor]]
"""Pairs (x, labels): inputs (B, ...) and classes (B,)."""
Batches = list[tuple[Tensor, Tensor]]


def take(data: Data, samples: int, dtype: torch.dtype | None = None) -> Batches:
    """The first ``samples`` of ``data``, in its batches; no more of it is gone through than that.

    Args:
        dtype: of the inputs, if another than theirs.

    Raises:
        InvalidInput: for a number below 1, data that are no such pairs, or none.
    """
    check_count(samples, "samples")
    batches: Batches = []
    for batch in data:
        x, labels = _pair(batch)
        left = samples - sum(len(found) for _, found in batches)
        batches.append((x[:left] if dtype is None else x[:left].to(dtype), labels[:left]))
        if left <= len(labels):
            break
    if not batches:
        raise InvalidInput("there is no data to look at the network with: give batches (x, labels)")
    return batches


def count(batches: Batches) -> int:
    """How many samples there are."""
    return sum(len(labels) for _, labels in batches)


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    match batch:
        case (Tensor() as x, Tensor() as labels) if labels.ndim == 1 and x.ndim > 0 and len(x) == len(labels):
            return x, labels
    raise InvalidInput(
        f"a batch of the data is a {type(batch).__name__} and no pair (x, labels): inputs of shape (B, ...) and their "
        "classes, of shape (B,), are expected"
    )
