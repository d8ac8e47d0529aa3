"""Early and late dropout: dropout in some epochs of a training only.

Dropout hinders overfitting. In the first epochs it also makes the directions of the gradients of several batches vary
less, so that a net that underfits ends with a lower training loss if it has dropout then, and then only (early
dropout); one that overfits may start better without it (late dropout). Both are Liu et al.'s (2023, "Dropout Reduces
Underfitting", arXiv 2303.01500, section 4).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torchvision.ops import StochasticDepth

from resode.blocks.foreign import is_drop_path
from resode.errors import InvalidInput, choose
from resode.layers.conv import Conv2d, Linear
from resode.layers.dropout import Dropout

PHASES = ("all", "early", "late")
SCHEDULES = ("constant", "linear")
_RATES: dict[type[nn.Module], str] = {
    Dropout: "p",
    Conv2d: "dropconnect",
    Linear: "dropconnect",
    _DropoutNd: "p",  # torch's and torchvision's, in nets of others
    StochasticDepth: "p",
    nn.MultiheadAttention: "dropout",  # of the weights of attention
}
_BUILT = "_built_drop_rate"


@dataclass(frozen=True)
class DropoutEpochs:
    """When, over the epochs of a training, dropout acts, and how strongly: a callback of ``fit``.

    In epoch e = 0, 1, …, every layer drops with c(e)·p, where p is what it was built with and, with E = ``epochs``,

    ======= ============================ ==========================================================
    phase   constant                     linear
    ======= ============================ ==========================================================
    all     c(e) = 1                     c(e) = min(1, (e + 1)/E): rising, and p from epoch E − 1 on
    early   c(e) = 1 if e < E, then 0    c(e) = max(0, 1 − e/E): falling, from p to 0 at epoch E
    late    c(e) = 0 if e < E, then 1    0 if e < E, then as "all", E epochs later
    ======= ============================ ==========================================================

    Early dropout and constant late dropout are Liu et al.'s, whose linear schedule falls from step to step and not from
    epoch to epoch; dropout that rises is that of ScheduledDropPath (Zoph et al. 2018, arXiv 1707.07012).

    Args:
        phase: all: in every epoch; early: in the first ``epochs`` only; late: only after them.
        epochs: E; for all epochs and a constant schedule there is none to give.
        schedule: constant, or linear (falling over the first epochs if early, else rising over as many).

    Raises:
        InvalidInput: for an unknown name, or a number of epochs that is not whole, or not above 0 where it is needed.
    """

    phase: Literal["all", "early", "late"] = "all"
    epochs: int = 0
    schedule: Literal["constant", "linear"] = "constant"

    def __post_init__(self) -> None:
        choose(self.phase, PHASES, "phase of dropout")
        choose(self.schedule, SCHEDULES, "schedule of dropout over the epochs")
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 0:
            raise InvalidInput(f"epochs of dropout is {self.epochs!r}: a whole number of at least 0 is expected")
        always = self.phase == "all" and self.schedule == "constant"
        if always and self.epochs:
            raise InvalidInput(
                f"epochs of dropout is {self.epochs}, and dropout of phase all and a constant schedule is the same in "
                "every epoch: choose phase early or late, or schedule linear"
            )
        if not always and not self.epochs:
            raise InvalidInput(
                f"dropout of phase {self.phase} and a {self.schedule} schedule needs a number of epochs of at least 1"
            )

    def factor(self, epoch: int) -> float:
        """c(``epoch``), in [0, 1]: what p is multiplied by."""
        if self.phase == "early":
            return max(0.0, 1.0 - epoch / self.epochs) if self.schedule == "linear" else float(epoch < self.epochs)
        since = epoch - self.epochs if self.phase == "late" else epoch
        if since < 0:
            return 0.0
        return min(1.0, (since + 1) / self.epochs) if self.schedule == "linear" else 1.0

    def __call__(self, model: nn.Module, optimizer: Optimizer | None, epoch: int) -> bool:
        """Set what every dropout in ``model`` drops with in ``epoch`` (from 0). The structure stays: always False."""
        scale_dropout(model, self.factor(epoch))
        return False

    def replay(self, model: nn.Module, epochs: int) -> None:
        """Let a net that was just built drop as it did at the end of so many ``epochs``.

        What an averaged copy of a net, or the net of a run folder, computes in evaluation depends on it where dropout
        is not inverted (there evaluation multiplies by 1 − p).
        """
        if epochs:
            scale_dropout(model, self.factor(epochs - 1))


def drop_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """The layers of ``model`` that drop at random, if their p is above 0.

    These are the dropouts of every kind (of units, channels, rectangles, whole branches; torch's, torchvision's and
    timm's too) and the layers that have DropConnect or drop weights of attention, if with a p of 0.

    Yields:
        The layer, the name of its attribute, and its present p.
    """
    for layer in model.modules():
        for kind, name in _RATES.items():
            if isinstance(layer, kind):
                yield layer, name, getattr(layer, name)
        if is_drop_path(layer):
            yield layer, "drop_prob", layer.drop_prob or 0.0


def scale_dropout(model: nn.Module, factor: float) -> None:
    """Let every layer of ``model`` drop with ``factor`` times the p it was built with.

    A layer remembers that p besides the one it was last given here, so that deep copies know it, too (the blocks of a
    refined net are such copies); if its p was set otherwise since, that one counts as built.
    """
    for layer, name, p in drop_rates(model):
        built, given = getattr(layer, _BUILT, (p, p))
        built = p if p != given else built
        scaled = factor * built
        setattr(layer, name, scaled)
        setattr(layer, _BUILT, (built, scaled))


def built_with_dropout(model: nn.Module) -> bool:
    """Whether a layer of ``model`` was built to drop anything, whatever it drops now."""
    return any(getattr(layer, _BUILT, (p, p))[0] > 0.0 for layer, _, p in drop_rates(model))


def evaluation_depends_on_rate(model: nn.Module) -> bool:
    """Whether a layer of ``model`` multiplies by 1 − p in evaluation (dropout that is not inverted)."""
    return any(not getattr(layer, "inverted", True) for layer, _, _ in drop_rates(model))
