"""The ``resode`` command."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import nn

from resode import demo, plots
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock, solver_settings
from resode.commandline import one_line_errors, read_arguments
from resode.dynamics import dynamics
from resode.errors import InvalidInput
from resode.limits.convergence import convergence
from resode.nets.config import Architecture
from resode.paths import lesion
from resode.report import png
from resode.runs import Run, jsonable
from resode.stack import Stack
from resode.train import fidelity
from resode.train.loop import EVALUATION_BATCH
from resode.train.metrics import evaluate
from resode.train.recalibrate import recalibrate
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, load, train

Folder = Annotated[Path, tyro.conf.Positional]
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Demo:
    """Train a residual net, a plain net and an ODE net on digits, analyse them, and write a report (3 minutes).

    Args:
        out: folder of the run; the same folder again shows what was found.
        device: cpu, cuda, cuda:1.
    """

    out: Path = Path("runs/demo")
    device: str = "cpu"

    def run(self) -> None:
        known = (self.out / "DONE").exists()
        paths = demo.demo(demo.Demo(), self.out, device=self.device)
        if known:
            print(f"This demo was run before; remove {self.out} to run it again.")
        print("Report: ", paths[0])
        for path in paths[1:]:
            print("Figure: ", path)


@dataclass(frozen=True)
class Train:
    """Train a net, and keep everything in a run folder. The same command again resumes an interrupted training.

    Example: resode train --net resnet --depth 20 --data cifar10 --data-dir data --device cuda

    Args:
        out: folder of the run; by default one under runs/ named after the settings.
        device: cpu, cuda, cuda:1.
    """

    out: Path | None = None
    device: str = "cpu"
    architecture: Annotated[Architecture, Flat] = field(default_factory=Architecture)
    stack: Annotated[Stack, Flat] = field(default_factory=Stack)
    data: Annotated[Data, Flat] = field(default_factory=Data)
    recipe: Annotated[Recipe, Flat] = field(default_factory=Recipe)

    def run(self) -> None:
        setup = Setup(architecture=self.architecture, stack=self.stack, data=self.data, recipe=self.recipe)
        out = self.out or Path("runs") / default_name(setup)
        run = train(setup, out, device=self.device, progress=True)
        result = run.result("train")
        for split in ("train", "validation", "test"):
            if split in result:
                print(f"{split:10s} {_scores(result[split])}")
        print(f"{result['parameters']:,} parameters, NFE {result['nfe']}, {result['seconds']:.1f} s of training")
        measured = result.get("gradient_fidelity", {})
        if said := fidelity.warning(measured.get("end", {}), "the trained net"):
            print("Warning:", said)
        print("Run:", run.path)


@dataclass(frozen=True)
class Evaluate:
    """Loss and accuracy of a trained net, an ODE net's with another solver if you like.

    Args:
        run_folder: folder of a run made by resode train.
        split: train, validation or test.
        solver: solve the ODE blocks with this solver; an embedded pair (dopri5, ...) chooses its steps.
        steps: with this many equal steps.
        rtol: with this relative tolerance, where steps are chosen; 0.001 if not given.
        atol: with this absolute tolerance, where steps are chosen; 0.001 if not given.
        recalibrate: first replace batch norm's running statistics by averages over the training set, without dropout
            and by that solver; the run keeps its own.
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    split: Literal["train", "validation", "test"] = "test"
    solver: str | None = None
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    recalibrate: bool = False
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        # How a solve is differentiated means nothing here, and the multistep solvers do not have every way.
        plain = {"gradient": "backprop"} if self.solver in MULTISTEP else {}
        with _solved_by(trained.model, solver=self.solver, steps=self.steps, rtol=self.rtol, atol=self.atol, **plain):
            if self.recalibrate and not recalibrate(trained.model, trained.data.batches("train", EVALUATION_BATCH)):
                raise InvalidInput("recalibrate given, and this net has no batch norm")
            found = evaluate(trained.model, trained.data.batches(self.split, EVALUATION_BATCH))
        print(f"{self.split}: {_scores(found.to_dict())}, NFE {found.nfe}")


@dataclass(frozen=True)
class Lesion:
    """Delete one step of a trained net at a time, and measure the error.

    Args:
        run_folder: folder of a run made by resode train.
        split: train, validation or test.
        solver: solve the ODE blocks with this solver.
        steps: with this many equal steps (needed if they were trained with steps of the solver's choice).
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    split: Literal["train", "validation", "test"] = "test"
    solver: str | None = None
    steps: int | None = None
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        data = trained.data.batches(self.split, EVALUATION_BATCH)
        # A reversible step acts on two coupled states, and is no residual step; its tableau's own step is.
        plain = {"gradient": "backprop"} if any(b.gradient == "reversible" for b in _ode_blocks(trained.model)) else {}
        if plain:
            print("The net was trained with reversible steps; here its ODE blocks make the plain ones of their solver.")
        with _solved_by(trained.model, solver=self.solver, steps=self.steps, **plain):
            if any(block.grid_steps is None for block in _ode_blocks(trained.model)):
                raise InvalidInput(
                    "the ODE blocks are solved adaptively, which leaves no fixed steps to delete: say with which, "
                    "--steps 16 or --solver rk4 --steps 16 for example"
                )
            table = lesion.single(dynamics(trained.model), data, progress=True)
        for step in table.lesions:
            score = step.score
            said = "cannot be deleted" if score is None else f"error {score.error:.2%}, loss {score.loss:.4f}"
            print(f"step {step.steps[0]:3d}  {step.label:18s} {said}")
        whole = table.baseline
        print(f"nothing deleted: error {whole.error:.2%}, loss {whole.loss:.4f} on {whole.count} samples")
        with Run.open(self.run_folder, write=True) as run:
            print("Result:", run.save_result(_of_split("lesion", self.split), table.to_dict()))
            chance = 1 - 1 / trained.data.classes
            picture = plots.lesions({trained.run.config["net"]["net"]: table.to_dict()}, chance, self.split)
            print("Figure:", run.write(f"figures/{_of_split('lesion', self.split)}.png", png(picture)))


@dataclass(frozen=True)
class Limits:
    """Evaluate a trained ODE net with other numbers of steps, against a fine reference solve.

    Args:
        run_folder: folder of a run made by resode train.
        steps: numbers of steps in each ODE block.
        solvers: Runge-Kutta methods: euler, midpoint, heun, rk4, dopri5, ...; by default the one of the
            training, or rk4 where that has no fixed steps.
        split: train, validation or test.
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    solvers: tuple[str, ...] = ()
    split: Literal["train", "validation", "test"] = "test"
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        data = trained.data.batches(self.split, EVALUATION_BATCH)
        table = convergence(trained.model, data, self.steps, self.solvers or None, progress=True)
        for e in table.evaluations:
            order = "" if e.order is None else f", order {e.order:.2f}"
            print(
                f"{e.solver:9s} {e.steps:4d} steps: accuracy {e.accuracy:.2%}, logits off by {e.logit_error:.2e}{order}"
            )
        print(f"reference, rk4 with {table.reference_steps} steps: accuracy {table.reference_accuracy:.2%}")
        with Run.open(self.run_folder, write=True) as run:
            print("Result:", run.save_result(_of_split("limits", self.split), table.to_dict()))
            picture = plots.convergence(table.to_dict(), self.split)
            print("Figure:", run.write(f"figures/{_of_split('limits', self.split)}.png", png(picture)))


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Lesion, tyro.conf.subcommand("lesion")]
    | Annotated[Limits, tyro.conf.subcommand("limits")]
)


def _of_split(name: str, split: str) -> str:
    """The name of a result: that of the test split has no addition."""
    return name if split == "test" else f"{name}-{split}"


def _ode_blocks(model: nn.Module) -> list[ODEBlock]:
    return [block for block in model.modules() if isinstance(block, ODEBlock)]


def _solved_by(model: nn.Module, **settings: Any) -> AbstractContextManager[None]:
    """The ODE blocks of ``model`` with those ``settings`` that were given.

    Raises:
        InvalidInput: for settings that no block of the model would heed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    blocks = _ode_blocks(model)
    if given and not blocks:
        raise InvalidInput(f"{', '.join(given)} given, and this net has no ODE block")
    return solver_settings(model, **given)


def _scores(values: dict[str, float]) -> str:
    return f"accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f} on {values['count']} samples"


def default_name(setup: Setup) -> str:
    """A folder's name for a training, told apart from that of any other settings by a hash."""

    settings = json.dumps(jsonable(setup), sort_keys=True)
    data = re.sub(r"[^a-z0-9]+", "-", setup.data.data.lower()).strip("-")[-30:]
    return (
        f"{data}-{setup.architecture.net}-seed-{setup.recipe.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what the user can mend is one line on the standard error, and a non-zero exit."""
    description = "Residual dynamics: one branch, run as a ResNet or as a neural ODE, and analysed as both."
    command = read_arguments(Command, "resode", description, arguments)
    with one_line_errors("resode"):
        command.run()
