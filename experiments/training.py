"""Trainings of nets that an experiment builds itself, each in a run folder of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def trained(
    folder: Path,
    config: Mapping[str, Any],
    model: Net,
    data: DataSet,
    recipe: Recipe,
    *,
    measure: Measure = lambda model: {},
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

    Returns:
        "records" of the epochs; "scores" (loss and accuracy by split), or None; "diverged", or None; "parameters";
        what ``measure`` finds "before" and "after" (None where it diverged).
    """
    with Run.create(folder, config, device=device) as run:
        if run.done:
            return run.result("train")
        found: dict[str, Any] = {"parameters": parameter_count(model), "before": measure(model), "after": None}
        try:
            fit(model, data, recipe, augment=augment, run=run, progress=True)
        except TrainingError as error:
            found |= {"scores": None, "diverged": str(error)}
        else:
            splits = [name for name in ("train", "validation", "test") if len(getattr(data, name))]
            scores = {name: evaluate(model, data.batches(name, EVALUATION_BATCH)).to_dict() for name in splits}
            found |= {"scores": scores, "diverged": None, "after": measure(model)}
        run.save_result("train", {**found, "records": run.metrics()})
        run.finish()
        return run.result("train")
