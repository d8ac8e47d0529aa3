"""Trainings of nets that an experiment builds itself, each in a run folder of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.errors import TrainingError
from resode.nets import Net
from resode.nets.net import parameter_count
from resode.runs import Run
from resode.train.loop import EVALUATION_BATCH, fit
from resode.train.metrics import evaluate
from resode.train.recipe import Recipe

Measure = Callable[[Net], Mapping[str, Any]]


class _Along:
    """A callback of ``fit`` that looks at the net before each epoch, and keeps what it sees in the run folder."""

    def __init__(self, look: Measure, run: Run) -> None:
        self.look, self.run = look, run

    def __call__(self, model: Net, optimizer: torch.optim.Optimizer | None, epoch: int) -> bool:
        name = f"along-{epoch}"
        # A training that is taken up again comes by the epochs that were done with the net as it was built.
        if not (self.run.path / "results" / f"{name}.json").is_file():
            self.run.save_result(name, self.look(model))
        return False

    def seen(self) -> list[dict[str, Any]]:
        """What was seen, by epoch."""
        count = len(list((self.run.path / "results").glob("along-*.json")))
        return [self.run.result(f"along-{epoch}") for epoch in range(count)]


def trained(
    folder: Path,
    config: Mapping[str, Any],
    model: Net,
    data: DataSet,
    recipe: Recipe,
    *,
    measure: Measure = lambda model: {},
    along: Measure | None = None,
    augment: Augment | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train ``model``, or take up its training, or read what came of it.

    A training that diverges is a finding too: it has no scores, and says at which loss it stopped.

    Args:
        folder: the training's run folder.
        config: everything that changes its outcome.
        model: the net before training, on ``device``.
        measure: looks at the net before training and after it.
        along: looks at the net before each epoch and, unless it diverged, after the last.

    Returns:
        "records" of the epochs; "scores" (loss and accuracy by split), or None; "diverged", or None; "parameters";
        what ``measure`` finds "before" and "after" (None where it diverged); what ``along`` finds, in a list.
    """
    with Run.create(folder, config, device=device) as run:
        if run.done:
            return run.result("train")
        found: dict[str, Any] = {"parameters": parameter_count(model), "before": measure(model), "after": None}
        watch = None if along is None else _Along(along, run)
        callbacks = () if watch is None else (watch,)
        try:
            fit(model, data, recipe, augment=augment, run=run, callbacks=callbacks, progress=True)
        except TrainingError as error:
            found |= {"scores": None, "diverged": str(error)}
        else:
            splits = [name for name in ("train", "validation", "test") if len(getattr(data, name))]
            scores = {name: evaluate(model, data.batches(name, EVALUATION_BATCH)).to_dict() for name in splits}
            found |= {"scores": scores, "diverged": None, "after": measure(model)}
            if watch is not None:
                watch(model, None, recipe.epochs)
        if watch is not None:
            found["along"] = watch.seen()
        run.save_result("train", {**found, "records": run.metrics()})
        run.finish()
        return run.result("train")
