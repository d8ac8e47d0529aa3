"""Averages of the weights along a training, to evaluate in place of the last ones.

========= ===================================================== ====================================================
kind      the average w̄ of the weights w                        source
========= ===================================================== ====================================================
ema       after each step, w̄ ← d_n·w̄ + (1 − d_n)·w with         Polyak & Juditsky 1992; Tarvainen & Valpola 2017; the
          d_n = min(d, (1 + n)/(10 + n)), n the weights in w̄    growing d_n of TensorFlow's ``ExponentialMovingAverage``
swa       after each epoch, the mean of all w so far            Izmailov et al. 2018, arXiv 1803.05407
lookahead after every k steps, w̄ ← d_s·w̄ + (1 − d_s)·w, w ← w̄   Zhang et al. 2019, arXiv 1907.08610, algorithm 1; the
          with d_s = d·s^p at the share s of the training       growing d_s of Jordan 2024, arXiv 2404.00498 (p = 3,
                                                                d = 0.95⁵, k = 5); p = 0 is Zhang et al.'s constant
========= ===================================================== ====================================================

With a constant d the first weights would have the share dⁿ in an ema: after 300 steps with d = 0.999 still 74 %.

Running statistics of batch norms are averaged like the weights; ``recalibrate`` gives those that belong to the average.
The first two are kept in torch's ``AveragedModel``; its own ways of averaging refuse the counters of batch norms.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resode.errors import InvalidInput, choose

AVERAGES = ("none", "ema", "swa", "lookahead")


@dataclass(frozen=True, kw_only=True)
class Average:
    """Which average of the weights is kept, validated, and the training's result.

    Args:
        kind: none, ema (after each step), swa (after each epoch), or lookahead (training goes on from the average).
        decay: of ema and lookahead, the share of the average that stays at an update (of ema less at its beginning).
        start: share of the training after which ema and swa begin; the weights are not averaged before.
        every: of lookahead, steps between two updates.
        power: of lookahead, the decay grows as this power of the share of the training that is done.

    Raises:
        InvalidInput: for an unknown kind or a number that makes no sense.
    """

    kind: Literal["none", "ema", "swa", "lookahead"] = "none"
    decay: float = 0.99
    start: float = 0.0
    every: int = 5
    power: float = 3.0

    def __post_init__(self) -> None:
        choose(self.kind, AVERAGES, "average")
        for name in ("decay", "start"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidInput(f"{name} of the average is {getattr(self, name)}: a number in [0, 1) is expected")
        if not isinstance(self.every, int) or self.every < 1:
            raise InvalidInput(f"every of the average is {self.every}: a whole number of steps is expected")
        if not 0.0 <= self.power < float("inf"):
            raise InvalidInput(f"power of the average is {self.power}: a number of at least 0 is expected")


class Averaging:
    """The average of ``model``'s weights during one training.

    Args:
        steps: optimizer steps of the whole training; steps_per_epoch: of an epoch.
    """

    def __init__(self, model: nn.Module, settings: Average, steps: int, steps_per_epoch: int) -> None:
        self.model, self.settings = model, settings
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._begin()

    def _begin(self) -> None:
        self._average: AveragedModel | None = None
        self._slow: dict[str, Tensor] | None = None
        if self.settings.kind == "lookahead":
            self._slow = {name: value.clone() for name, value in _floating(self.model).items()}

    def restart(self) -> None:
        """Forget everything: the model has another structure."""
        self._begin()

    def after_step(self, step: int) -> None:
        """Take note of the weights after optimizer step ``step`` (counted from 0)."""
        kind, begun = self.settings.kind, step + 1 > self.settings.start * self.steps
        if kind == "lookahead" and (step + 1) % self.settings.every == 0:
            self._look_ahead(self.settings.decay * ((step + 1) / self.steps) ** self.settings.power)
        elif begun and (kind == "ema" or (kind == "swa" and (step + 1) % self.steps_per_epoch == 0)):
            if self._average is None:
                self._average = self._averaged()
            self._average.update_parameters(self.model)

    def _averaged(self) -> AveragedModel:
        average = self._exponential if self.settings.kind == "ema" else self._equal
        return AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    def _exponential(self, averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        # ``count`` is on the weights' device, and reading it would wait for that; the counter itself is on the CPU.
        n = float(self._average.n_averaged)
        _towards(averages, values, 1.0 - min(self.settings.decay, (1.0 + n) / (10.0 + n)))

    def _equal(self, averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        _towards(averages, values, 1.0 / (float(count) + 1.0))

    @torch.no_grad()
    def _look_ahead(self, decay: float) -> None:
        for name, value in _floating(self.model).items():
            value.copy_(self._slow[name].lerp_(value, 1.0 - decay))

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model to evaluate: the averaged one, or, as long as nothing was averaged, the model itself.

        With lookahead the model has the slow weights while it is evaluated.
        """
        if self._slow is None:
            yield self.model if self._average is None else self._average.module
            return
        fast = {name: value.clone() for name, value in _floating(self.model).items()}
        self._set(self._slow)
        try:
            yield self.model
        finally:
            self._set(fast)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in _floating(self.model).items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs."""
        average = None if self._average is None else self._average.state_dict()
        return {"average": average, "slow": self._slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must have its structure of then."""
        self._begin()
        if state["average"] is not None:
            self._average = self._averaged()
            self._average.load_state_dict(state["average"])
        if state["slow"] is not None:
            self._slow = state["slow"]


@torch.no_grad()
def _towards(averages: Sequence[Tensor], values: Sequence[Tensor], share: float) -> None:
    """Move ``averages`` by ``share`` of the way to ``values``; whole numbers (counters) become those of ``values``."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, share)
    else:
        torch._foreach_copy_(averages, values)


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that can be averaged; those shared by several modules once."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value.detach() for name, value in named if value.is_floating_point()}
