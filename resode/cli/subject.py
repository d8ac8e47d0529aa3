"""The network that an analysis looks at, and the data it looks with: a run of ours, or a model by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from resode.blocks.ode import ode_blocks
from resode.cli.common import of_split, solved_by
from resode.data.dataset import Batches
from resode.data.stream import ImageStream
from resode.dynamics import ResidualDynamics, dynamics
from resode.dynamics.inference import inference
from resode.errors import InvalidInput
from resode.nets import zoo
from resode.paths.lesion import Data
from resode.runs import Run, digest
from resode.train.session import check_device, load


@dataclass(frozen=True)
class Look:
    """What was opened.

    Args:
        view: the network, as steps, made for evaluation.
        batches: of the data, to be gone through any number of times.
        classes: how many the network tells apart.
        name: of the network, for titles.
        run: the folder for what is found, open for writing.
    """

    view: ResidualDynamics
    batches: Data
    classes: int
    name: str
    run: Run

    @property
    def chance(self) -> float:
        """The error of guessing."""
        return 1 - 1 / self.classes


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        network: folder of a run made by resode train; or torchvision:NAME or timm:NAME, torchvision:resnet50 for one.
        weights: of a network by name: DEFAULT or another of the package's names for pretrained weights, or the path
            of a state-dict file.
        data: of a network by name: imagefolder:PATH, with the images in PATH/SPLIT/CLASS/*.
        data_dir: folder of a run's data, if it is not where it was in training.
        split: train, validation or test.
        limit: that many samples of the split, evenly spaced; all if not given.
        batch_size: samples in a batch.
        solver: solve a run's ODE blocks with this solver.
        steps: with this many equal steps; by default as they were trained (if they chose their steps: with those they
            choose on the first batch).
        precision: float32, or bfloat16.
        device: cpu, cuda, cuda:1.
        out: folder for what is found; by default a run's own, or one under runs/ named after the settings.
    """

    network: Annotated[str, tyro.conf.Positional]
    weights: str | None = None
    data: str | None = None
    data_dir: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = None
    batch_size: int = 256
    solver: str | None = None
    steps: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    out: Path | None = None

    @contextmanager
    def open(self, *, exact: bool = False) -> Iterator[Look]:
        """The network and its data, while the run folder is held.

        Args:
            exact: the network as it is; otherwise a copy of it with its batch norms folded, which computes the same to
                rounding, and faster.
        """
        if zoo.is_zoo(self.network):
            with self._model(exact) as look:
                yield look
        else:
            with self._run(exact) as look:
                yield look

    def result(self, name: str) -> str:
        """The name of a result of this split."""
        return of_split(name, self.split)

    @contextmanager
    def _run(self, exact: bool) -> Iterator[Look]:
        for name in ("weights", "data"):
            if getattr(self, name) is not None:
                raise InvalidInput(
                    f"{name} is {getattr(self, name)!r}, and a run has its own: leave it out, or name a network as "
                    "torchvision:resnet50"
                )
        trained = load(self.network, device=self.device, data_dir=self.data_dir)
        batches = Batches(trained.data, self.split, self.batch_size, self.limit)
        if not len(batches):
            raise InvalidInput(f"the {self.split} split of {self.network} is empty: choose another")
        example = next(iter(batches))[0]
        # A reversible step acts on two coupled states, and is no residual step; its tableau's own step is.
        blocks = ode_blocks(trained.model).values()
        plain = {"gradient": "backprop"} if any(block.gradient == "reversible" for block in blocks) else {}
        if plain:
            print("The net was trained with reversible steps; here its ODE blocks make the plain ones of their solver.")
        with solved_by(trained.model, solver=self.solver, steps=self.steps, **plain):
            if any(block.grid_steps is None for block in blocks):
                print("The ODE blocks choose their steps; here they make those that they choose on the first batch.")
            view = self._view(trained.model, example, exact)
            where = trained.run.path if self.out is None else self.out
            with Run.open(where, write=True) if self.out is None else self._folder(where) as run:
                yield Look(view, batches, trained.data.classes, trained.run.config["net"]["net"], run)

    @contextmanager
    def _model(self, exact: bool) -> Iterator[Look]:
        for name in ("solver", "steps", "data_dir"):
            if getattr(self, name) is not None:
                raise InvalidInput(f"{name} is given, and {self.network} has no ODE block and no data of its own")
        kind, _, path = (self.data or "").partition(":")
        if kind != "imagefolder" or not path:
            raise InvalidInput(
                f"data is {self.data!r}: {self.network} needs images, --data imagefolder:PATH, with "
                f"PATH/{self.split}/CLASS/*"
            )
        place = check_device(self.device)
        model = zoo.load(self.network, weights=self.weights)
        batches = ImageStream(
            path, self.split, model.transform, batch_size=self.batch_size, limit=self.limit, device=place
        )
        batches.require_classes(model.classes)
        view = self._view(model.model.to(place), next(iter(batches))[0][:2], exact)
        with self._folder(self.out or self._default_folder()) as run:
            yield Look(view, batches, model.classes, self.network.partition(":")[2], run)

    def _view(self, model: nn.Module, example: Tensor, exact: bool) -> ResidualDynamics:
        if exact and self.precision == "float32":
            return dynamics(model, example)
        return inference(model, example, dtype=None if self.precision == "float32" else torch.bfloat16)

    def _settings(self) -> dict[str, Any]:
        """What the results depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "device", "batch_size")}

    def _default_folder(self) -> Path:
        return Path("runs") / f"{self.network.replace(':', '-').replace('/', '-')}-{digest(self._settings())}"

    def _folder(self, path: Path) -> Run:
        return Run.create(path, {"subject": self._settings()}, device=self.device)
