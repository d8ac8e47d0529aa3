"""A session: one training from its settings to its run folder, and a trained net from its run folder."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resode import data, nets
from resode.blocks.ode import solver_settings
from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.errors import InvalidInput, RunError
from resode.nets import Architecture, NetConfig
from resode.nets.net import evaluating, parameter_count
from resode.runs import Run
from resode.stack import Stack
from resode.train import fidelity
from resode.train.loop import EVALUATION_BATCH, check_fit, fit, fitting, recipe_callbacks
from resode.train.metrics import evaluate
from resode.train.recipe import Recipe
from resode.train.sparsity import as_factors


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a training.

    Args:
        data: digits, mnist, fashion-mnist, cifar10, cifar100, moons, circles, or imagefolder:PATH.
        data_dir: folder of torchvision's data sets, or where to download them to.
        validation: share of the training set held out for validation.
        label_noise: share of the training labels drawn anew at random.
        image_size: make the images square, of this many pixels a side.

    Raises:
        InvalidInput: for an unknown name, or an image folder that is not one.
    """

    data: str = "digits"
    data_dir: str = "data"
    validation: float = 0.1
    label_noise: float = 0.0
    image_size: int | None = None

    def __post_init__(self) -> None:
        data.check_name(self.data)

    def load(self, seed: int, device: str | torch.device) -> DataSet:
        """The data set, split by ``seed``, on ``device``."""
        return data.load(
            self.data,
            data_dir=self.data_dir,
            seed=seed,
            validation=self.validation,
            label_noise=self.label_noise,
            image_size=self.image_size,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that changes the outcome of a training."""

    architecture: Architecture = field(default_factory=Architecture)
    stack: Stack = field(default_factory=Stack)
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe)

    def net_config(self, dataset: DataSet) -> NetConfig:
        """The net for the shapes of ``dataset``."""
        return NetConfig(
            **asdict(self.architecture),
            stack=self.stack,
            channels=dataset.channels,
            size=dataset.size,
            classes=dataset.classes,
        )


def check_device(name: str) -> torch.device:
    """The device ``name``, if it is there.

    Raises:
        InvalidInput: when it is not, with those that are.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in there:
        raise InvalidInput(f"device {name!r} is not there: this machine has {', '.join(there)}")
    return torch.device(name)


def train(setup: Setup, path: str | Path, *, device: str = "cpu", progress: bool = False) -> Run:
    """Train as ``setup`` says, in the run folder ``path``; an interrupted run is resumed, a finished one returned.

    The folder is made once everything that can be checked was: the device, the data, the recipe, the net (by a
    forward pass on two samples). At its end ``results/train.json`` holds loss and accuracy on each split in
    evaluation mode, the number of parameters, the evaluations of f and the seconds of training; and, where gradients
    come from the adjoint, how far off they are at the start and at the end (see ``train.fidelity``). With ``progress``
    a gradient that is off by too much at the start is warned of on the standard error.

    Raises:
        InvalidInput: for settings that do not fit each other or the data.
        RunError: when the folder belongs to another training.
        TrainingError: when the loss is no longer finite.
    """
    place = check_device(device)
    with _deterministic(setup.recipe.deterministic):
        return _train(setup, path, place, progress)


def _train(setup: Setup, path: str | Path, place: torch.device, progress: bool) -> Run:
    recipe = setup.recipe
    dataset = setup.data.load(recipe.seed, place)
    config = setup.net_config(dataset)
    model = nets.build(config, recipe.seed).to(place)
    check_fit(model, dataset, recipe)
    _try_out(model, dataset, setup.stack.augment)
    held = {"net": config.to_dict(), "data": asdict(setup.data), "recipe": asdict(recipe)}
    with Run.create(path, held, device=place) as run:
        if run.done:
            return run
        measured = {"start": _fidelity(model, dataset)}
        _warn(measured["start"], progress)
        records = fit(
            model,
            dataset,
            recipe,
            augment=setup.stack.augment,
            run=run,
            compile=setup.architecture.compiled,
            progress=progress,
        )
        splits = [name for name in ("train", "validation", "test") if len(getattr(dataset, name))]
        found = {
            name: evaluate(model, dataset.batches(name, EVALUATION_BATCH), mirrored=recipe.mirrored) for name in splits
        }
        measured["end"] = _fidelity(model, dataset)
        run.save_result(
            "train",
            {
                **{name: {"loss": m.loss, "accuracy": m.accuracy, "count": m.count} for name, m in found.items()},
                "nfe": found["test"].nfe,
                "parameters": parameter_count(model),
                "epochs": len(records),
                "seconds": sum(record["seconds"] for record in records),
                **({"gradient_fidelity": measured} if measured["start"] else {}),
            },
        )
        run.finish()
    return run


def _fidelity(model: nn.Module, dataset: DataSet) -> dict[str, dict[str, Any]]:
    some = dataset.train.take(slice(fidelity.SAMPLES))
    return fidelity.measure(model, dataset.standardize(some.inputs), some.labels)


def _warn(found: Mapping[str, Mapping[str, Any]], progress: bool) -> None:
    said = fidelity.warning(found, "the net before training") if progress else None
    if said:
        print("Warning:", said, file=sys.stderr, flush=True)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms alone, if ``wanted``; the global setting is restored afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        # Read by CUDA's BLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _try_out(model: nn.Module, dataset: DataSet, augment: Augment) -> None:
    """A forward pass of two augmented samples: whatever does not fit is found before a run folder is made."""
    generator = torch.Generator().manual_seed(0)
    x, _ = next(dataset.batches(dataset.train.take(slice(2)), 2, generator=generator, augment=augment, epoch=0))
    with evaluating(model), solver_settings(model, compile_mode=None):
        model(x)


@dataclass(frozen=True)
class Trained:
    """A trained net with its data, as its run folder holds them."""

    model: nn.Module
    data: DataSet
    run: Run


def load(path: str | Path, *, device: str = "cpu", data_dir: str | None = None) -> Trained:
    """The trained net of the run folder ``path``, in evaluation mode.

    Of a training that has not come to its end it has the weights of the last epoch done, neither averaged nor the best.

    Args:
        data_dir: where the data lie now, if not where they lay in training: of an image folder, its path.

    Raises:
        RunError: when there is no such run, nothing was trained in it yet, or its checkpoint is not of its net.
        InvalidInput: when its data or the device are not there.
    """
    place = check_device(device)
    run = Run.open(path)
    missing = {"net", "data", "recipe"} - set(run.config)
    if missing:
        inside = sorted(path.parent for path in run.path.glob("trainings/*/config.json"))
        hint = f": give one of its own trainings, {inside[0]} for one" if inside else ""
        raise RunError(f"{run.path} holds no training (its config has no {', '.join(sorted(missing))}){hint}")
    checkpoint = run.load_checkpoint(map_location=place)
    if checkpoint is None:
        raise RunError(f"{run.path} has no checkpoint yet: let its training finish at least one epoch")
    settings = Data(**_known(Data, {**run.config["data"], **_moved(run.config["data"]["data"], data_dir)}))
    seed = run.config["recipe"]["seed"]
    model = nets.build(NetConfig.from_dict(run.config["net"]), seed).to(place)
    recipe = _recipe(run)
    for callback in recipe_callbacks(recipe):
        callback.replay(model, checkpoint["epoch"])
    with as_factors(model) if recipe.factorize else nullcontext(), fitting(run):
        model.load_state_dict(checkpoint["model"])
    return Trained(model.eval(), settings.load(seed, place), run)


def _moved(name: str, data_dir: str | None) -> dict[str, str]:
    """The settings of the data set ``name`` that differ when it lies in ``data_dir``; none without one."""
    if not data_dir:
        return {}
    return {"data": f"imagefolder:{data_dir}"} if name.startswith("imagefolder:") else {"data_dir": data_dir}


def _recipe(run: Run) -> Recipe:
    try:
        return Recipe.from_dict(run.config["recipe"])
    except InvalidInput as error:
        raise RunError(f"{run.path} was made by another version of resode: {error}") from error


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise RunError(f"the run was made by another version of resode: it sets {', '.join(sorted(unknown))}")
    return dict(values)
