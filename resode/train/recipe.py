"""The recipe: the settings of one training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from resode.errors import InvalidInput, choose, positive
from resode.train.averaging import Average
from resode.train.dropout_epochs import DropoutEpochs
from resode.train.losses import LOSSES
from resode.train.optimizers import OPTIMIZERS
from resode.train.optimizers import make_optimizer as optimizer_named
from resode.train.penalties import Penalties
from resode.train.refinement import check_epochs
from resode.train.schedules import SCHEDULES, relative_rate

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONAL = ("clip", "adaptive_clip", "patience", "active_steps", "freeze_norm")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training.

    Args:
        epochs: passes over the training split.
        batch_size: images in a batch (the last, smaller batch of an epoch is left out where there is a whole one).
        repeats: each batch has batch_size/repeats images, so many times each, every time augmented anew; an epoch is
            as many batches as without.
        optimizer: sgd (with momentum) or adam, with weight decay in the gradient; or sgdw or adamw, apart from it.
        lr: learning rate at its peak.
        momentum: momentum of sgd and sgdw.
        nesterov: Nesterov's form of the momentum.
        weight_decay: decay of weights; norms, biases and single numbers are left alone.
        schedule: of the learning rate after the warm-up: cosine or linear (to ``final``), step (times gamma at each of
            the milestones), constant; or one-cycle, whose rise is the warm-up.
        warmup: epochs over which the learning rate rises to lr; at most ``epochs``.
        milestones: for the step schedule, as shares of the training.
        gamma: factor of the step schedule.
        final: share of lr at which cosine and linear end.
        loss: cross-entropy, or bce (each class a question by itself).
        label_smoothing: share of the label that is spread over all classes.
        target_threshold: of bce, a mixed image has the classes whose share in it is above this.
        penalty: L1 and group sparsity, in the loss.
        factorize: train each weight that decays as a product of two factors, so that the weight decay (of sgd or adam)
            is an L1 penalty and makes weights 0; the trained net has the products (see ``train.sparsity``).
        dropping: in which epochs dropout acts.
        average: the average of the weights that is kept.
        clip: largest norm of the gradient; none if not given.
        adaptive_clip: largest norm of a unit's gradient, in units of the norm of its weights; none if not given.
        freeze_norm: after this many epochs, batch norm keeps its running statistics and uses them; never if not given.
        recalibrate: at the end, average batch norm's statistics anew over the training set.
        mirrored: average the logits of an image and of its mirror image, wherever the net is evaluated.
        patience: stop after this many epochs without a better validation accuracy, and restore the best weights.
        refine: after these numbers of epochs, make each residual block two, and each step of an ODE block, and train
            the deeper net on; never if not given.
        active_steps: train on this many of the residual blocks, drawn anew for each batch, the others being their
            shortcuts (see ``train.sampled``); all if not given.
        precision: float32; or bfloat16 or float16 (autocast, with the loss scaled for float16).
        channels_last: lay images and the weights of convolutions channels-last in memory: faster on most devices.
        seed: of initialization, order, augmentation, dropout and the validation split.
        deterministic: use deterministic algorithms alone (on CUDA; the CPU's are deterministic anyway).

    Raises:
        InvalidInput: for an unknown name or a number that makes no sense.
    """

    epochs: int = 30
    batch_size: int = 128
    repeats: int = 1
    optimizer: Literal["sgd", "sgdw", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "linear", "step", "constant", "one-cycle"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    final: float = 0.0
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    label_smoothing: float = 0.0
    target_threshold: float = 0.0
    penalty: Penalties = field(default_factory=Penalties)
    factorize: bool = False
    dropping: DropoutEpochs = field(default_factory=DropoutEpochs)
    average: Average = field(default_factory=Average)
    clip: float | None = None
    adaptive_clip: float | None = None
    freeze_norm: int | None = None
    recalibrate: bool = False
    mirrored: bool = False
    patience: int | None = None
    refine: tuple[int, ...] = ()
    active_steps: int | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        choose(self.optimizer, OPTIMIZERS, "optimizer")
        choose(self.schedule, SCHEDULES, "schedule")
        choose(self.loss, LOSSES, "loss")
        choose(self.precision, PRECISIONS, "precision")
        whole = ("epochs", "batch_size", "repeats", "patience", "active_steps", "freeze_norm")
        for name in (*whole, "lr", "gamma", "clip", "adaptive_clip"):
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            positive(value, name)
            if name in whole and not isinstance(value, int):
                raise InvalidInput(f"{name} is {value}: a whole number is expected")
        check_epochs(self.refine)
        if self.refine and self.refine[-1] >= self.epochs:
            raise InvalidInput(
                f"refine after epoch {self.refine[-1]} of {self.epochs}: nothing would be trained after it; use a "
                f"number below {self.epochs}"
            )
        if self.freeze_norm is not None and self.freeze_norm >= self.epochs:
            raise InvalidInput(
                f"freeze_norm after epoch {self.freeze_norm} of {self.epochs}: nothing would be trained after it; use "
                f"a number below {self.epochs}"
            )
        if self.freeze_norm is not None and self.recalibrate:
            raise InvalidInput(
                "recalibrate averages batch norm's statistics anew, and freeze_norm has trained the net for those that "
                "it froze: use one of them"
            )
        for name in ("momentum", "label_smoothing", "target_threshold"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidInput(f"{name} is {getattr(self, name)}: a number in [0, 1) is expected")
        if self.target_threshold and self.loss != "bce":
            raise InvalidInput(
                f"target_threshold is {self.target_threshold:g}, and the loss is {self.loss}, which takes the shares "
                f"of the classes as they are: leave it 0, or use loss bce"
            )
        if not 0.0 <= self.final <= 1.0:
            raise InvalidInput(f"final is {self.final}: a share of lr in [0, 1] is expected")
        for name in ("weight_decay", "warmup"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} is {getattr(self, name)}: a number of at least 0 is expected")
        if self.warmup > self.epochs:
            raise InvalidInput(
                f"warmup is {self.warmup:g} of {self.epochs} epochs: the learning rate would never reach lr; lower it"
            )
        if self.nesterov and (self.optimizer not in ("sgd", "sgdw") or self.momentum == 0.0):
            raise InvalidInput("nesterov is a form of sgd's momentum: use optimizer sgd with a momentum above 0")
        if self.factorize and (self.optimizer not in ("sgd", "adam") or self.weight_decay == 0.0):
            raise InvalidInput(
                f"factorize makes an L1 penalty of a weight decay that is part of the gradient, and the optimizer is "
                f"{self.optimizer} with weight_decay {self.weight_decay:g}: use sgd or adam, and a decay above 0"
            )
        if self.factorize and (self.average.kind != "none" or self.refine or self.active_steps is not None):
            raise InvalidInput(
                "factorize trains factors, which can be neither averaged (average) nor refined (refine) nor left out "
                "(active_steps) as weights are: leave these away"
            )
        if any(not 0.0 < m < 1.0 for m in self.milestones):
            raise InvalidInput(f"milestones are {self.milestones}: shares of the training in (0, 1) are expected")
        if self.batch_size % self.repeats:
            least = self.batch_size // self.repeats * self.repeats
            raise InvalidInput(
                f"batch_size is {self.batch_size}, which {self.repeats} repeats do not divide: use "
                f"{least + self.repeats}, say, or other repeats"
            )
        if self.dropping.phase != "all" and self.dropping.epochs > self.epochs:
            raise InvalidInput(
                f"dropout is {self.dropping.phase} with {self.dropping.epochs} epochs, and the training has "
                f"{self.epochs}: lower it"
            )
        if self.dropping.phase == "late" and self.dropping.epochs == self.epochs:
            raise InvalidInput(
                f"dropout is late, after {self.dropping.epochs} epochs, and the training has no more: it would never "
                f"act; use a number below {self.epochs}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe that ``dataclasses.asdict`` (and JSON) made ``values`` of; settings it lacks have their defaults.

        Raises:
            InvalidInput: for a name that is no setting, or a value that makes no sense.
        """
        parts = {"penalty": Penalties, "dropping": DropoutEpochs, "average": Average}
        held = {cls: values, **{kind: values.get(name, {}) for name, kind in parts.items()}}
        unknown = [name for kind, given in held.items() for name in set(given) - {f.name for f in fields(kind)}]
        if unknown:
            raise InvalidInput(f"unknown settings of a recipe: {', '.join(sorted(unknown))}")
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name not in parts}
        return cls(**plain, **{name: kind(**values[name]) for name, kind in parts.items() if name in values})


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer for the parameters of ``model``."""
    return optimizer_named(
        model,
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0 (see ``train.schedules``)."""
    warm, total = round(recipe.warmup * steps_per_epoch), recipe.epochs * steps_per_epoch
    settings = {"milestones": recipe.milestones, "gamma": recipe.gamma, "final": recipe.final}
    return recipe.lr * relative_rate(recipe.schedule, step, total, warm, **settings)
