"""Lesions: what a trained network does without one of its steps, which it was never trained to do without.

Veit, Wilber & Belongie 2016, arXiv 1605.06431, section 4.1: a residual net loses little when one block is deleted,
since half of its 2^L paths remain; a plain net has one path, and falls to chance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from resode.dynamics import ResidualDynamics
from resode.errors import InvalidInput


@dataclass(frozen=True)
class Lesion:
    """The network without step ``index``.

    ``error`` is the share of wrong answers and ``loss`` the mean cross-entropy; both None where the step cannot be
    deleted: a transition, or a plain layer that changes the shape of the state.
    """

    index: int
    label: str
    kind: str
    stage: int
    t: float
    error: float | None
    loss: float | None


@dataclass(frozen=True)
class LesionTable:
    """Error and loss of the whole network on ``count`` samples, and without each of its steps."""

    count: int
    error: float
    loss: float
    lesions: tuple[Lesion, ...]

    @property
    def deletable(self) -> tuple[Lesion, ...]:
        """The lesions that could be made."""
        return tuple(lesion for lesion in self.lesions if lesion.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LesionTable":
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "lesions": tuple(Lesion(**lesion) for lesion in values["lesions"])})


@dataclass
class _Sum:
    """Wrong answers and summed loss."""

    wrong: float = 0.0
    loss: float = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.wrong += int((logits.argmax(1) != labels).sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))


def single(view: ResidualDynamics, data: Iterable[tuple[Tensor, Tensor]], *, progress: bool = False) -> LesionTable:
    """Delete one step at a time, and measure error and loss on ``data``.

    The state before each step is carried along, and the rest of the network run from there: L deletions of a net of L
    steps cost L·(L + 1)/2 evaluations of a step in place of L².

    Args:
        view: the network.
        data: pairs (x, labels).

    Raises:
        InvalidInput: when ``data`` is empty.
    """
    whole, without = _Sum(), [_Sum() for _ in view.steps]
    possible = [step.kind != "transition" for step in view.steps]
    count = 0
    with view.evaluation():
        for x, labels in tqdm(data, desc="lesions", unit="batch", leave=False, disable=None if progress else True):
            count += len(labels)
            h = view.stem(x)
            for i, step in enumerate(view.steps):
                after = step(h)
                if possible[i]:
                    lesioned = step.deleted()(h)
                    possible[i] = lesioned.shape == after.shape
                if possible[i]:
                    without[i].add(view.head(view.run(lesioned, i + 1)), labels)
                h = after
            whole.add(view.head(h), labels)
    if count == 0:
        raise InvalidInput("lesions need data to measure the error on, and there is none")
    lesions = tuple(
        Lesion(
            i,
            step.label,
            step.kind,
            step.stage,
            step.t,
            total.wrong / count if able else None,
            total.loss / count if able else None,
        )
        for i, (step, total, able) in enumerate(zip(view.steps, without, possible, strict=True))
    )
    return LesionTable(count, whole.wrong / count, whole.loss / count, lesions)
