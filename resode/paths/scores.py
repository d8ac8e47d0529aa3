"""Error and loss of networks on a data set, with their confidence intervals."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.errors import InvalidInput

Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """What a network gets wrong on ``count`` samples.

    Args:
        error: share of wrong answers.
        error_interval: its 95% interval, of Wilson's score (1927): (p + z²/2n ± z√(p(1−p)/n + z²/4n²))/(1 + z²/n).
        loss: mean cross-entropy.
        loss_interval: its 95% interval, ± z·s/√n with s the standard deviation over the samples.
        by_class: error on the samples of each class (None where there are none); None if it was not asked for.

    The intervals are for the network as it is, and tell of the choice of samples alone.
    """

    count: int
    error: float
    error_interval: Bounds
    loss: float
    loss_interval: Bounds
    by_class: tuple[float | None, ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Score":
        """The inverse of :meth:`to_dict`, for what JSON made lists of, and None of numbers that are not finite."""
        by_class = values.get("by_class")
        return cls(
            values["count"],
            values["error"],
            tuple(values["error_interval"]),
            _number(values["loss"]),
            tuple(_number(bound) for bound in values["loss_interval"]),
            None if by_class is None else tuple(by_class),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def wilson(wrong: int, count: int) -> Bounds:
    """Wilson's 95% interval of a share of ``wrong`` out of ``count``."""
    p, n = wrong / count, count
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # by rounding alone, p = 0 and 1 would lie beyond


class Tallies:
    """Running sums over batches for ``networks`` networks, on the device of their logits.

    Args:
        networks: how many there are.
        by_class: count errors by class, too.
    """

    def __init__(self, networks: int, by_class: bool = False) -> None:
        self.networks, self.by_class = networks, by_class
        self.count = 0
        self._wrong: Tensor | None = None
        self._loss: Tensor | None = None
        self._squares: Tensor | None = None
        self._of_class: Tensor | None = None

    def begin(self, labels: Tensor, classes: int) -> None:
        """A new batch, of these ``labels``.

        Raises:
            InvalidInput: for labels that are no classes of the network.
        """
        if ((labels < 0) | (labels >= classes)).any():
            least, most = (int(bound) for bound in labels.aminmax())
            raise InvalidInput(f"labels go from {least} to {most}, and the network knows the classes 0 … {classes - 1}")
        if self._wrong is None:
            self._loss = torch.zeros(self.networks, dtype=torch.float64, device=labels.device)
            self._squares = torch.zeros_like(self._loss)
            self._wrong = torch.zeros(self.networks, classes, dtype=torch.int64, device=labels.device)
            self._of_class = torch.zeros(classes, dtype=torch.int64, device=labels.device)
        self.count += len(labels)
        self._of_class += torch.bincount(labels, minlength=classes)

    def add(self, network: int, logits: Tensor, labels: Tensor) -> None:
        """Logits of one network on the batch."""
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
        self._loss[network] += losses.sum()
        self._squares[network] += losses.square().sum()
        # The largest of numbers that are none would be some class.
        wrong = (logits.argmax(1) != labels) | logits.isnan().any(1)
        self._wrong[network].index_add_(0, labels, wrong.long())

    def scores(self) -> list[Score]:
        """The score of each network.

        Raises:
            InvalidInput: when there was no data.
        """
        if self.count == 0:
            raise InvalidInput("lesions need data to measure the error on, and there is none")
        wrong, loss, squares = self._wrong.tolist(), self._loss.tolist(), self._squares.tolist()
        return [self._score(*sums) for sums in zip(wrong, loss, squares, strict=True)]

    def _score(self, wrong: list[int], loss: float, squares: float) -> Score:
        n = self.count
        mean = loss / n
        variance = max(0.0, squares / n - mean * mean) * n / max(n - 1, 1)
        half = Z * math.sqrt(variance / n)
        of_class = self._of_class.tolist()
        by_class = tuple(w / m if m else None for w, m in zip(wrong, of_class, strict=True))
        return Score(
            n,
            sum(wrong) / n,
            wilson(sum(wrong), n),
            mean,
            (mean - half, mean + half),
            by_class if self.by_class else None,
        )

    def state(self) -> dict[str, Any]:
        """The sums as plain values, to go on from another day."""
        return {
            "count": self.count,
            **{name: None if (t := getattr(self, f"_{name}")) is None else t.tolist() for name in _SUMS},
        }

    def restore(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ValueError: when it is of another number of networks (and others, when it is no state).
        """
        self.count = state["count"]
        for name, dtype in _SUMS.items():
            held = state[name]
            if held is not None and name != "of_class" and len(held) != self.networks:
                raise ValueError(f"it has the sums of {len(held)} networks, and not of {self.networks}")
            setattr(self, f"_{name}", None if held is None else torch.tensor(held, dtype=dtype, device=device))


_SUMS = {"wrong": torch.int64, "loss": torch.float64, "squares": torch.float64, "of_class": torch.int64}
"""The sums of a Tallies, with their types."""
