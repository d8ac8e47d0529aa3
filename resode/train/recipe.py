"""The recipe: the settings of one training, and what they mean for the optimizer and its learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from resode.errors import InvalidInput, choose, positive
from resode.train.penalties import parameter_groups
from resode.train.refinement import check_epochs

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training.

    Args:
        epochs: passes over the training split.
        batch_size: images in a batch (the last, smaller batch of an epoch is left out where there is a whole one).
        optimizer: sgd (with momentum) or adamw.
        lr: learning rate at its peak.
        momentum: momentum of sgd.
        nesterov: Nesterov's form of the momentum.
        weight_decay: decay of weights; norms, biases and single numbers are left alone.
        schedule: cosine (to 0), step (times gamma at each of the milestones) or constant.
        warmup: epochs over which the learning rate rises linearly to lr; at most ``epochs``.
        milestones: for the step schedule, as shares of the training.
        gamma: factor of the step schedule.
        label_smoothing: share of the label that is spread over all classes.
        clip: largest norm of the gradient; none if not given.
        patience: stop after this many epochs without a better validation accuracy, and restore the best weights.
        refine: after these numbers of epochs, make each residual block two, and each step of an ODE block, and train
            the deeper net on; never if not given.
        active_steps: train on this many of the residual blocks, drawn anew for each batch, the others being their
            shortcuts (see ``train.sampled``); all if not given.
        precision: float32, or bfloat16 (autocast).
        seed: of initialization, order, augmentation, dropout and the validation split.
        deterministic: use deterministic algorithms alone (on CUDA; the CPU's are deterministic anyway).

    Raises:
        InvalidInput: for an unknown name or a number that makes no sense.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip: float | None = None
    patience: int | None = None
    refine: tuple[int, ...] = ()
    active_steps: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        choose(self.optimizer, OPTIMIZERS, "optimizer")
        choose(self.schedule, SCHEDULES, "schedule")
        choose(self.precision, PRECISIONS, "precision")
        for name in ("epochs", "batch_size", "lr", "gamma", "clip", "patience", "active_steps"):
            value = getattr(self, name)
            if value is None and name in ("clip", "patience", "active_steps"):
                continue
            positive(value, name)
            if name in ("epochs", "batch_size", "patience", "active_steps") and not isinstance(value, int):
                raise InvalidInput(f"{name} is {value}: a whole number is expected")
        check_epochs(self.refine)
        if self.refine and self.refine[-1] >= self.epochs:
            raise InvalidInput(
                f"refine after epoch {self.refine[-1]} of {self.epochs}: nothing would be trained after it; use a "
                f"number below {self.epochs}"
            )
        for name in ("momentum", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidInput(f"{name} is {getattr(self, name)}: a number in [0, 1) is expected")
        for name in ("weight_decay", "warmup"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} is {getattr(self, name)}: a number of at least 0 is expected")
        if self.warmup > self.epochs:
            raise InvalidInput(
                f"warmup is {self.warmup:g} of {self.epochs} epochs: the learning rate would never reach lr; lower it"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0.0):
            raise InvalidInput("nesterov is a form of sgd's momentum: use optimizer sgd with a momentum above 0")
        if any(not 0.0 < m < 1.0 for m in self.milestones):
            raise InvalidInput(f"milestones are {self.milestones}: shares of the training in (0, 1) are expected")


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer for the parameters of ``model``."""
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    In the warm-up of w steps it is lr·(step + 1)/w. From there on, with s ∈ [0, 1) the share of the whole training,
    cosine gives lr·(1 + cos πs')/2 with s' the share of what follows the warm-up (Loshchilov & Hutter 2017, arXiv
    1608.03983, eq. 5), and step gives lr·gamma^k after k milestones.
    """
    warm, total = round(recipe.warmup * steps_per_epoch), recipe.epochs * steps_per_epoch
    if step < warm:
        return recipe.lr * ((step + 1) / warm)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    if recipe.schedule == "step":
        return recipe.lr * recipe.gamma ** sum(step / total >= m for m in recipe.milestones)
    return recipe.lr
