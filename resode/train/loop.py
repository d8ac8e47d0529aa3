"""``fit``: the training loop, the same for every net."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks.compiled import COMPILE_MODES, begin_graphs
from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.errors import InvalidInput, RunError, TrainingError, choose
from resode.layers.layout import lay_channels_last
from resode.nets.refine import refine
from resode.runs import Run
from resode.seeding import seed_default
from resode.train.averaging import Averaging
from resode.train.dropout_epochs import DropoutEpochs, evaluation_depends_on_rate
from resode.train.frozen import FreezeNorm
from resode.train.metrics import evaluate, first_nonfinite, nfe
from resode.train.progress import Bar
from resode.train.recalibrate import recalibrate
from resode.train.recipe import Recipe, learning_rate, make_optimizer
from resode.train.refinement import Refine
from resode.train.sampled import SampledSteps
from resode.train.sparsity import as_factors
from resode.train.step import Stepper

Callback = Callable[[nn.Module, torch.optim.Optimizer, int], bool | None]
"""Called before each epoch with the model, the optimizer and the number of epochs done. It may change both in place
(the optimizer must hold the model's parameters afterwards), and returns whether it changed the model's structure."""

EVALUATION_BATCH = 512
WATCH = 20
"""Steps between two looks at the loss on the device: each look waits for the device to finish."""


@dataclass
class _State:
    """Where a training stands at the end of an epoch: all that a checkpoint holds."""

    epoch: int = 0
    best_accuracy: float = -1.0
    stale: int = 0
    stopped: bool = False
    best: dict[str, Tensor] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def begin_level(self) -> None:
        """The model is another one: its validation is watched anew, as the best weights so far do not fit it."""
        self.best_accuracy, self.stale, self.best = -1.0, 0, None


def fit(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    *,
    augment: Augment | None = None,
    run: Run | None = None,
    callbacks: Sequence[Callback] = (),
    compile: bool | str = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train ``model`` on the training split of ``data``, on the device where both are.

    The random numbers of an epoch (order, augmentation, dropout) are drawn from seeds made of the recipe's seed and
    the number of the epoch, so that a training that was interrupted and resumed from its last checkpoint gives the
    same numbers as one that was not. The global random state is left as it was.

    At the end the model has the weights that the recipe asks for: the best ones (patience), or the average, or the
    last; and batch norm's statistics are recalibrated, if asked for. Factors are multiplied out, also when the training
    ends with an error.

    Args:
        augment: augmentation of the training batches.
        run: a run folder to log to, write a checkpoint to after each epoch, and resume from.
        callbacks: called before each epoch; they may change the structure of ``model`` (:class:`Refine`). When a run is
            resumed they are called for the epochs that were done, too, on the model as it was built: what they do must
            follow from the number of the epoch, so that the checkpoint fits the structure they make. Patience counts
            from the last change of structure, and averages begin there.
        compile: compile the forward and the backward pass by torch.compile: minutes at first, and faster afterwards
            where a net is bound by launches and memory. True, or a mode of torch.compile: "reduce-overhead" launches
            all kernels of a pass at once, as CUDA graphs, which batches of one size, as here, allow.
        progress: show a bar with loss, accuracy, evaluations of f and images per second (where the output is a
            terminal; elsewhere a line an epoch).

    Returns:
        One record an epoch: epoch, lr, train_loss, train_accuracy (both over the epoch, as seen while training),
        penalty (where blocks or the recipe have any; it is added to the loss, and no part of train_loss),
        validation_loss, validation_accuracy (where there is such a split; those of the average, where one is kept),
        nfe, seconds, images_per_second.

    Raises:
        TrainingError: when the loss or a weight is no longer finite; the last checkpoint stays as it was.
        InvalidInput: as :func:`check_fit`, and for an unknown mode of compile.
        RunError: when the checkpoint of ``run`` is not one of ``model``.
    """
    check_fit(model, data, recipe)
    if isinstance(compile, str):
        choose(compile, COMPILE_MODES, "mode of compile")
    if recipe.channels_last:
        lay_channels_last(model)
    with as_factors(model) if recipe.factorize else nullcontext():
        training = _Training(
            model,
            data,
            recipe,
            augment,
            Stepper(model, recipe, make_optimizer(recipe, model), data.train.inputs.device),
            (*recipe_callbacks(recipe), *callbacks),
            compile,
        )
        return _fit(training, run, progress)


def _fit(training: "_Training", run: Run | None, progress: bool) -> list[dict[str, Any]]:
    """:func:`fit`, from the last checkpoint of ``run`` or from the beginning."""
    data, recipe = training.data, training.recipe
    state = _State() if run is None else _resume(run, training)
    devices = [data.train.inputs.device] if data.train.inputs.is_cuda else []
    with torch.random.fork_rng(devices), Bar(recipe.epochs, state.epoch, training.seen, progress) as bar:
        while state.epoch < recipe.epochs and not state.stopped:
            if training.before_epoch(state.epoch):
                state.begin_level()
            record = _epoch(training, state.epoch, bar.batch)
            with training.averaging.evaluated() as judged:
                # The averaged net is a copy made in an earlier epoch: where dropout is not inverted, its p matters.
                recipe.dropping(judged, training.stepper.optimizer, state.epoch)
                if len(data.validation):
                    batches = data.batches("validation", EVALUATION_BATCH)
                    validation = evaluate(judged, batches, mirrored=recipe.mirrored)
                    record["validation_loss"], record["validation_accuracy"] = validation.loss, validation.accuracy
                _watch(state, recipe, judged, record)
                ended = state.stopped or state.epoch == recipe.epochs
                if ended:
                    result = _copied(judged) if state.best is None else state.best
            if ended:
                _end(training, result)
            state.records.append(record)
            bar.epoch(record)
            if run is not None:
                run.log(record)
                run.save_checkpoint(_checkpoint(state, training))
    return state.records


def recipe_callbacks(recipe: Recipe) -> tuple[Any, ...]:
    """The callbacks that a recipe asks for. Each has ``replay(model, epochs)``, too, which gives a net that was just
    built what it had at the end of so many epochs."""
    frozen = () if recipe.freeze_norm is None else (FreezeNorm(recipe.freeze_norm),)
    return (Refine(recipe.refine), recipe.dropping, *frozen)


@dataclass
class _Training:
    """What goes through a training: the model and all that changes with it."""

    model: nn.Module
    data: DataSet
    recipe: Recipe
    augment: Augment | None
    stepper: Stepper
    callbacks: tuple[Callback, ...]
    compile: bool | str

    def __post_init__(self) -> None:
        self.forward = self._forward()
        steps = self.recipe.epochs * self.steps
        self.averaging = Averaging(self.model, self.recipe.average, steps, self.steps)

    @property
    def batch(self) -> int:
        """Images in a batch."""
        return min(self.recipe.batch_size, len(self.data.train))

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch; the images that do not fill a batch are left out."""
        return len(self.data.train) // self.batch

    @property
    def seen(self) -> int:
        """Images seen in an epoch."""
        return self.steps * self.batch

    def _forward(self) -> nn.Module:
        """The model as it is called in training."""
        active = self.recipe.active_steps
        called = self.model if active is None else SampledSteps(self.model, active)
        if not self.compile:
            return called
        return torch.compile(called, mode="default" if self.compile is True else self.compile)

    def before_epoch(self, epoch: int) -> bool:
        """Call the callbacks; whether any changed the structure of the model."""
        changed = [bool(call(self.model, self.stepper.optimizer, epoch)) for call in self.callbacks]
        if any(changed):
            self.averaging.restart()
            self.forward = self._forward()
        return any(changed)


def check_fit(model: nn.Module, data: DataSet, recipe: Recipe) -> None:
    """Check that ``model`` can be trained on ``data`` as ``recipe`` says, before anything is trained.

    Raises:
        InvalidInput: for patience without a validation split, or with a dropout whose rate both changes and matters in
            evaluation; a training split smaller than 2, batches of one sample for a net with batch norm, a number of
            active steps that ``model`` does not have, a refinement of one that cannot be refined, mirror images of
            points, or frozen or recalibrated norms where there are none.
    """
    if recipe.refine:
        refine(model)
    if recipe.active_steps is not None:
        SampledSteps(model, recipe.active_steps)
    if recipe.repeats > 1 and min(recipe.batch_size, len(data.train)) % recipe.repeats:
        raise InvalidInput(
            f"the training split has {len(data.train)} samples, one batch, which {recipe.repeats} repeats do not "
            "divide: use other repeats, or a smaller batch_size"
        )
    if recipe.mirrored and data.size is None:
        raise InvalidInput("mirrored averages over an image and its mirror image, and this data are points")
    if (recipe.recalibrate or recipe.freeze_norm is not None) and not _batch_norms(model):
        raise InvalidInput("recalibrate and freeze_norm are about batch norm, and this net has none")
    if recipe.patience is not None and not len(data.validation):
        raise InvalidInput("patience needs a validation split to watch: set a validation share above 0")
    if recipe.patience is not None and recipe.dropping != DropoutEpochs() and evaluation_depends_on_rate(model):
        raise InvalidInput(
            "patience restores the weights of an earlier epoch, and dropout that is not inverted would multiply them "
            "by 1 - p of a later one, as p changes from epoch to epoch: use inverted dropout"
        )
    if len(data.train) < 2:
        raise InvalidInput(f"the training split has {len(data.train)} samples: at least 2 are needed")
    if recipe.batch_size < 2 and _batch_norms(model):
        raise InvalidInput("batch norm averages over a batch, and batch_size is 1: raise it, or use another norm")


def _batch_norms(model: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


def _epoch(training: _Training, epoch: int, tell: Callable[[int, float, float, int], None]) -> dict[str, Any]:
    """One pass over the training split; the record of it."""
    model, data, recipe = training.model, training.data, training.recipe
    generator = torch.Generator().manual_seed(_seed(recipe.seed, 2 * epoch))
    steps = training.steps
    device = data.train.inputs.device
    seed_default(_seed(recipe.seed, 2 * epoch + 1), device)
    losses, right = torch.zeros(steps, device=device), torch.zeros((), dtype=torch.int64, device=device)
    penalties: list[Tensor] = []
    begin, lr, told = time.perf_counter(), 0.0, 0
    training.forward.train()
    batches = data.batches(
        "train",
        training.batch,
        generator=generator,
        augment=training.augment,
        drop_last=True,
        repeats=recipe.repeats,
        epoch=epoch,
    )
    for step, (x, wanted) in enumerate(batches):
        lr = learning_rate(recipe, epoch * steps + step, steps)
        begin_graphs(training.compile, device)
        loss, penalty, hits = training.stepper.step(training.forward, x, wanted, lr)
        training.averaging.after_step(epoch * steps + step)
        losses[step] = loss
        right += hits
        if penalty is not None:
            penalties.append(penalty)
        if device.type == "cpu" or step % WATCH == WATCH - 1 or step == steps - 1:
            _require_finite(losses[: step + 1], epoch, steps, recipe)
            done = (step + 1) * training.batch
            tell(done - told, float(losses[: step + 1].mean()), float(right) / done, nfe(model))
            told = done
    seconds = time.perf_counter() - begin
    if not all(torch.stack([p.isfinite().all() for p in model.parameters()])):
        raise _diverged("a weight", "no longer finite", (epoch + 1) * steps, epoch, recipe)
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": float(losses.mean()),
        **({"penalty": float(torch.stack(penalties).mean())} if penalties else {}),
        "train_accuracy": float(right) / training.seen,
        "nfe": nfe(model),
        "seconds": seconds,
        "images_per_second": training.seen / seconds,
    }


def _require_finite(losses: Tensor, epoch: int, steps: int, recipe: Recipe) -> None:
    bad = first_nonfinite(losses)
    if bad is not None:
        raise _diverged("the loss", float(losses[bad]), epoch * steps + bad + 1, epoch, recipe)


def _diverged(what: str, value: float | str, step: int, epoch: int, recipe: Recipe) -> TrainingError:
    return TrainingError(
        f"{what} became {value} at step {step} (epoch {epoch + 1}): try a learning rate below {recipe.lr:g}, a "
        "warm-up, clip=1, or a norm; the last checkpoint, if there is one, is whole"
    )


def _watch(state: _State, recipe: Recipe, judged: nn.Module, record: dict[str, Any]) -> None:
    """Close the epoch: note a better validation accuracy, and stop when there was none for long enough."""
    state.epoch += 1
    if recipe.patience is None:
        return
    if record["validation_accuracy"] > state.best_accuracy:
        state.best_accuracy, state.stale = record["validation_accuracy"], 0
        state.best = _copied(judged)
    else:
        state.stale += 1
        state.stopped = state.stale >= recipe.patience


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _end(training: _Training, result: dict[str, Tensor]) -> None:
    """Give the model its weights at the end of the training: ``result``, and statistics of its own if asked for."""
    model = training.model
    model.load_state_dict(result)
    if training.recipe.recalibrate:
        # Shuffled, as in training: the images of a folder come class by class, of which no batch is like the whole.
        order = torch.Generator().manual_seed(_seed(training.recipe.seed, 0))
        recalibrate(model, training.data.batches("train", EVALUATION_BATCH, generator=order))


def _seed(seed: int, stream: int) -> int:
    """A seed for one stream of random numbers of a training."""
    return (seed * 1_000_003 + stream) % 2**63


def _checkpoint(state: _State, training: _Training) -> dict[str, Any]:
    return {
        "epoch": state.epoch,
        "best_accuracy": state.best_accuracy,
        "stale": state.stale,
        "stopped": state.stopped,
        "best": state.best,
        "model": training.model.state_dict(),
        "optimizer": training.stepper.optimizer.state_dict(),
        "scaler": training.stepper.scaler.state_dict(),
        "averaging": training.averaging.state_dict(),
    }


def _resume(run: Run, training: _Training) -> _State:
    """The state of the last checkpoint, loaded into the training; a new one if there is none."""
    checkpoint = run.load_checkpoint(map_location=training.data.train.inputs.device)
    if checkpoint is None:
        run.rewind(0)
        return _State()
    for epoch in range(checkpoint["epoch"]):
        training.before_epoch(epoch)
    with fitting(run):
        training.averaging.load_state_dict(checkpoint.pop("averaging"))
        training.model.load_state_dict(checkpoint.pop("model"))
        training.stepper.optimizer.load_state_dict(checkpoint.pop("optimizer"))
        training.stepper.scaler.load_state_dict(checkpoint.pop("scaler"))
    # What was logged after the checkpoint is computed, and logged, again.
    run.rewind(checkpoint["epoch"])
    return _State(**checkpoint, records=run.metrics())


@contextmanager
def fitting(run: Run) -> Iterator[None]:
    """Say what it means when the checkpoint of ``run`` cannot be loaded into its net.

    Raises:
        RunError: in place of what torch raises.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the checkpoint of {run.path} does not fit the net of its config (made by another version of resode, "
            "perhaps): train again in another folder"
        ) from error
