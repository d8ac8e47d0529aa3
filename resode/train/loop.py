"""``fit``: the training loop, the same for every net."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from resode.blocks.transport import collect_penalties
from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.errors import InvalidInput, RunError, TrainingError
from resode.nets.refine import refine
from resode.runs import Run
from resode.train.metrics import evaluate, first_nonfinite, nfe
from resode.train.recipe import PRECISIONS, Recipe, learning_rate, make_optimizer
from resode.train.refinement import Refine
from resode.train.sampled import SampledSteps

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
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train ``model`` on the training split of ``data``, on the device where both are.

    The random numbers of an epoch (order, augmentation, dropout) are drawn from seeds made of the recipe's seed and
    the number of the epoch, so that a training that was interrupted and resumed from its last checkpoint gives the
    same numbers as one that was not. The global random state is left as it was.

    Args:
        augment: augmentation of the training batches.
        run: a run folder to log to, write a checkpoint to after each epoch, and resume from.
        callbacks: called before each epoch; they may change the structure of ``model`` (:class:`Refine`). When a run is
            resumed they are called for the epochs that were done, too, on the model as it was built: what they do must
            follow from the number of the epoch, so that the checkpoint fits the structure they make. Patience counts
            from the last change of structure.
        progress: show a bar with loss, accuracy, evaluations of f and images per second (where the output is a
            terminal; elsewhere a line an epoch).

    Returns:
        One record an epoch: epoch, lr, train_loss, train_accuracy (both over the epoch, as seen while training),
        penalty (where blocks have any; it is added to the loss, and no part of train_loss), validation_loss,
        validation_accuracy (where there is such a split), nfe, seconds, images_per_second.

    Raises:
        TrainingError: when the loss or a weight is no longer finite; the last checkpoint stays as it was.
        InvalidInput: as :func:`check_fit`.
        RunError: when the checkpoint of ``run`` is not one of ``model``.
    """
    check_fit(model, data, recipe)
    callbacks = (Refine(recipe.refine), *callbacks)
    optimizer = make_optimizer(recipe, model)
    state = _State() if run is None else _resume(run, model, optimizer, callbacks)
    devices = [data.train.inputs.device] if data.train.inputs.is_cuda else []
    batch = min(recipe.batch_size, len(data.train))
    images = batch * (len(data.train) // batch)
    with torch.random.fork_rng(devices), _Bar(recipe, state, images, progress) as bar:
        while state.epoch < recipe.epochs and not state.stopped:
            for callback in callbacks:
                if callback(model, optimizer, state.epoch):
                    state.begin_level()
            record = _epoch(model, data, recipe, optimizer, augment, state.epoch, bar.batch)
            if len(data.validation):
                validation = evaluate(model, data.batches("validation", EVALUATION_BATCH))
                record["validation_loss"], record["validation_accuracy"] = validation.loss, validation.accuracy
            _watch(state, recipe, model, record)
            state.records.append(record)
            bar.epoch(record)
            if run is not None:
                run.log(record)
                run.save_checkpoint(_checkpoint(state, model, optimizer))
    return state.records


def check_fit(model: nn.Module, data: DataSet, recipe: Recipe) -> None:
    """Check that ``model`` can be trained on ``data`` as ``recipe`` says, before anything is trained.

    Raises:
        InvalidInput: for patience without a validation split, a training split smaller than 2, batches of one sample
            for a net with batch norm, a number of active steps that ``model`` does not have, or a refinement of one
            that cannot be refined.
    """
    if recipe.refine:
        refine(model)
    if recipe.active_steps is not None:
        SampledSteps(model, recipe.active_steps)
    if recipe.patience is not None and not len(data.validation):
        raise InvalidInput("patience needs a validation split to watch: set a validation share above 0")
    if len(data.train) < 2:
        raise InvalidInput(f"the training split has {len(data.train)} samples: at least 2 are needed")
    if recipe.batch_size < 2 and any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        raise InvalidInput("batch norm averages over a batch, and batch_size is 1: raise it, or use another norm")


def _epoch(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    augment: Augment | None,
    epoch: int,
    tell: Callable[[int, float, float, int], None],
) -> dict[str, Any]:
    """One pass over the training split; the record of it."""
    generator = torch.Generator().manual_seed(_seed(recipe.seed, 2 * epoch))
    batch = min(recipe.batch_size, len(data.train))
    steps = len(data.train) // batch
    device = data.train.inputs.device
    seed_default(_seed(recipe.seed, 2 * epoch + 1), device)
    losses, right = torch.zeros(steps, device=device), torch.zeros((), dtype=torch.int64, device=device)
    penalties: list[Tensor] = []
    begin, lr, told = time.perf_counter(), 0.0, 0
    trained = model if recipe.active_steps is None else SampledSteps(model, recipe.active_steps)
    trained.train()
    batches = data.batches("train", batch, generator=generator, augment=augment, drop_last=True)
    for step, (x, labels) in enumerate(batches):
        lr = learning_rate(recipe, epoch * steps + step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, penalty, hits = _step(trained, recipe, optimizer, x, labels)
        losses[step] = loss
        right += hits
        if penalty is not None:
            penalties.append(penalty)
        if device.type == "cpu" or step % WATCH == WATCH - 1 or step == steps - 1:
            _require_finite(losses[: step + 1], epoch, steps, recipe)
            done = (step + 1) * batch
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
        "train_accuracy": float(right) / (steps * batch),
        "nfe": nfe(model),
        "seconds": seconds,
        "images_per_second": steps * batch / seconds,
    }


def _step(
    model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step of the optimizer; the loss, the penalty (if there is any) and the right answers before it."""
    precision = PRECISIONS[recipe.precision]
    autocast = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision is not torch.float32)
    with autocast, collect_penalties() as penalties:
        logits = model(x)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    penalty = torch.stack([p.float() for p in penalties]).sum() if penalties else None
    optimizer.zero_grad()
    (loss if penalty is None else loss + penalty).backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.detach(), None if penalty is None else penalty.detach(), (logits.argmax(1) == labels).sum()


def _require_finite(losses: Tensor, epoch: int, steps: int, recipe: Recipe) -> None:
    bad = first_nonfinite(losses)
    if bad is not None:
        raise _diverged("the loss", float(losses[bad]), epoch * steps + bad + 1, epoch, recipe)


def _diverged(what: str, value: float | str, step: int, epoch: int, recipe: Recipe) -> TrainingError:
    return TrainingError(
        f"{what} became {value} at step {step} (epoch {epoch + 1}): try a learning rate below {recipe.lr:g}, a "
        "warm-up, clip=1, or a norm; the last checkpoint, if there is one, is whole"
    )


def _watch(state: _State, recipe: Recipe, model: nn.Module, record: dict[str, Any]) -> None:
    """Close the epoch: note a better validation accuracy, and stop when there was none for long enough."""
    state.epoch += 1
    if recipe.patience is None:
        return
    if record["validation_accuracy"] > state.best_accuracy:
        state.best_accuracy, state.stale = record["validation_accuracy"], 0
        state.best = {name: value.clone() for name, value in model.state_dict().items()}
    else:
        state.stale += 1
        state.stopped = state.stale >= recipe.patience
    if (state.stopped or state.epoch == recipe.epochs) and state.best is not None:
        model.load_state_dict(state.best)


def _seed(seed: int, stream: int) -> int:
    """A seed for one stream of random numbers of a training."""
    return (seed * 1_000_003 + stream) % 2**63


def seed_default(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of ``device``, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _checkpoint(state: _State, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "epoch": state.epoch,
        "best_accuracy": state.best_accuracy,
        "stale": state.stale,
        "stopped": state.stopped,
        "best": state.best,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def _resume(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, callbacks: Sequence[Callback]) -> _State:
    """The state of the last checkpoint, loaded into ``model`` and ``optimizer``; a new one if there is none."""
    checkpoint = run.load_checkpoint(map_location=next(model.parameters()).device)
    if checkpoint is None:
        run.rewind(0)
        return _State()
    for epoch in range(checkpoint["epoch"]):
        for callback in callbacks:
            callback(model, optimizer, epoch)
    with fitting(run):
        model.load_state_dict(checkpoint.pop("model"))
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
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


class _Bar:
    """Shows how a training goes: a bar over all its images on a terminal, else a line an epoch; or nothing."""

    def __init__(self, recipe: Recipe, state: _State, images: int, progress: bool) -> None:
        self.progress, self.epochs, self.images = progress, recipe.epochs, images
        self.bar = tqdm(
            total=recipe.epochs * images,
            initial=state.epoch * images,
            unit="image",
            unit_scale=True,
            disable=None if progress else True,
            leave=False,
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def batch(self, images: int, loss: float, accuracy: float, evaluations: int) -> None:
        """Note ``images`` more, and how the epoch stands."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, NFE {evaluations}", refresh=False)
        self.bar.update(images)

    def epoch(self, record: dict[str, Any]) -> None:
        """Note the end of an epoch."""
        if not self.progress or not self.bar.disable:
            return
        said = f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}"
        if "validation_accuracy" in record:
            said += f", validation {record['validation_accuracy']:.1%}"
        said += f", NFE {record['nfe']}, {record['images_per_second']:.0f} images/s"
        print(f"epoch {record['epoch']:3d}/{self.epochs}: {said}", flush=True)
