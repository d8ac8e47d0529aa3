"""The demo: one residual branch at two depths, on digits, and a plain net beside them.

Three nets with the same stack and recipe, each from three seeds: a residual net, a plain net of the same depth, and
an ODE net of the same branch. Then every step of each is deleted, one at a time, and the ODE net is evaluated with
other numbers of steps. All of it goes into one run folder and one report.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from resode import plots, runs
from resode.dynamics import dynamics
from resode.intervals import half_width
from resode.limits.convergence import convergence
from resode.nets import Architecture
from resode.paths import lesion
from resode.report import Picture, Table, write_report
from resode.runs import Run
from resode.stack import Stack
from resode.train import fidelity
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, check_device, load, train

GAP = 0.10
"""By how much the plain net's training accuracy should lie below the residual net's, for degradation to be shown."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Settings of the demo.

    Args:
        seeds: seeds each net is trained from; the first one's nets are analysed.
        architectures: the nets, by name.
        stack, data, recipe: shared by all of them.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    architectures: Mapping[str, Architecture] = field(
        default_factory=lambda: {
            "residual net": Architecture(net="resnet", depth=44, kind="preact"),
            "plain net": Architecture(net="plain", depth=44),
            "ODE net": Architecture(net="odenet", kind="preact", solver="heun", steps=4),
        }
    )
    stack: Stack = field(default_factory=Stack)
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=64, lr=0.1, warmup=1.0))

    def setup(self, name: str, seed: int) -> Setup:
        """The training of one net from one seed."""
        recipe = replace(self.recipe, seed=seed)
        return Setup(architecture=self.architectures[name], stack=self.stack, data=self.data, recipe=recipe)


def demo(settings: Demo, out: Path, *, device: str = "cpu", progress: bool = True) -> list[Path]:
    """Run the demo in the run folder ``out``; an interrupted one goes on where it stopped.

    Returns:
        The paths of the report and its pictures.
    """
    check_device(device)
    with _one_thread(), Run.create(out, runs.jsonable(settings), device=device) as run:
        if not run.done:
            trained = _train_all(settings, run.path, device, progress)
            _analyse(settings, run, trained, device, progress)
            _report(settings, run, trained)
            run.finish()
    return [run.path / "report.html", *sorted((run.path / "figures").glob("*.png"))]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch's. For nets as small as these a second one gains little, and loses much beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_all(settings: Demo, out: Path, device: str, progress: bool) -> dict[tuple[str, int], Run]:
    trained = {}
    for seed in settings.seeds:
        for name in settings.architectures:
            folder = out / "trainings" / f"{name.replace(' ', '-').lower()}-seed-{seed}"
            trained[name, seed] = train(settings.setup(name, seed), folder, device=device, progress=progress)
            if progress:
                result = trained[name, seed].result("train")
                print(
                    f"{name}, seed {seed}: accuracy {result['train']['accuracy']:.1%} on the training set, "
                    f"{result['test']['accuracy']:.1%} on the test set, {result['seconds']:.0f} s",
                    flush=True,
                )
    return trained


def _analyse(settings: Demo, run: Run, trained: Mapping[tuple[str, int], Run], device: str, progress: bool) -> None:
    """Delete each step of each net of the first seed; evaluate its ODE nets at other numbers of steps."""
    tables: dict[str, Any] = {}
    for name, architecture in settings.architectures.items():
        found = load(trained[name, settings.seeds[0]].path, device=device)
        test = list(found.data.batches("test", 512))
        tables[name] = lesion.single(dynamics(found.model, test[0][0][:2]), test, progress=progress).to_dict()
        if architecture.net == "odenet":
            table = convergence(found.model, test, progress=progress)
            run.save_result("convergence", table.to_dict())
    run.save_result("lesions", tables)
    run.save_result(
        "trainings",
        {name: [trained[name, seed].result("train") for seed in settings.seeds] for name in settings.architectures},
    )


def _report(settings: Demo, run: Run, trained: Mapping[tuple[str, int], Run]) -> None:
    results, tables, table = run.result("trainings"), run.result("lesions"), run.result("convergence")
    classes = next(iter(trained.values())).config["net"]["classes"]
    histories = {f"{name}#{seed}": trained[name, seed].metrics() for name, seed in trained}
    sections = [
        _accuracy_table(results),
        Picture("training", "Training", _degradation(results), plots.training(histories)),
        Picture(
            "lesions", "Each step deleted in turn", _what_lesions_show(tables), plots.lesions(tables, 1 - 1 / classes)
        ),
        Picture("convergence", "The ODE net at other depths", _what_steps_show(table), plots.convergence(table)),
    ]
    introduction = [
        "The same residual branch f(t, h) was trained as a residual net, h ← h + f(h), and as a neural ODE, "
        "dh/dt = f(t, h), with one stack and one recipe; a plain net of the residual net's depth stands beside them.",
        f"Data: scikit-learn's digits, 8×8 pixels, 10 classes. Each net was trained from {len(settings.seeds)} seeds "
        f"for {settings.recipe.epochs} epochs; deletions and step counts are shown for seed {settings.seeds[0]}.",
    ]
    write_report(run, "One branch, two depths", [*introduction, *gradient_warnings(results)], sections)


def gradient_warnings(results: Mapping[str, list[Mapping[str, Any]]]) -> list[str]:
    """A paragraph for each net that followed gradients too far from those of its solves, from any of its seeds."""
    said = []
    for name, found in results.items():
        ends = [result.get("gradient_fidelity", {}).get("end", {}) for result in found]
        warnings = [text for end in ends if (text := fidelity.warning(end, f"the trained {name}"))]
        if warnings:
            said.append(f"Warning ({len(warnings)} of {len(found)} seeds). {warnings[0]}")
    return said


def _accuracy_table(results: Mapping[str, list[Mapping[str, Any]]]) -> Table:
    rows = [
        (
            name,
            _interval([r["train"]["accuracy"] for r in found]),
            _interval([r["test"]["accuracy"] for r in found]),
            f"{found[0]['parameters']:,}",
            str(found[0]["nfe"]) if found[0]["nfe"] else "–",
            f"{mean(r['seconds'] for r in found):.1f} s",
        )
        for name, found in results.items()
    ]
    count = len(next(iter(results.values())))
    return Table(
        "What was trained",
        f"Accuracy in evaluation mode, mean and 95% interval (Student's t) over n = {count} seeds. NFE counts the "
        "evaluations of residual branches in one forward pass: depth, as far as cost goes. Time is of one training.",
        ("net", "training accuracy", "test accuracy", "parameters", "NFE", "time"),
        rows,
    )


def _interval(values: list[float]) -> str:
    """The mean, and half the width of its 95% interval by Student's t."""
    return f"{mean(values):.1%}" + (f" ± {half_width(values):.1%}" if len(values) > 1 else "")


def _degradation(results: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """Says whether the plain net trains worse than the residual net, seed by seed."""
    gaps = [
        residual["train"]["accuracy"] - plain["train"]["accuracy"]
        for residual, plain in zip(results["residual net"], results["plain net"], strict=True)
    ]
    points = ", ".join(f"{100 * gap:.0f}" for gap in gaps)
    if min(gaps) >= GAP:
        return (
            f"Degradation: the plain net's training accuracy lies {points} points below the residual net's (one number "
            "a seed). Without shortcuts the same layers hardly train; overfitting has no part in it."
        )
    return (
        f"No clear degradation: the plain net's training accuracy lies {points} points below the residual net's (one "
        f"number a seed), where at least {100 * GAP:.0f} on each seed were expected. A deeper plain net would show it."
    )


def _what_lesions_show(tables: Mapping[str, Mapping[str, Any]]) -> str:
    said = []
    for name, table in tables.items():
        scores = [step["score"] for step in table["lesions"] if step["score"] is not None]
        rises = [score["error"] - table["baseline"]["error"] for score in scores]
        middle = f"{100 * median(rises):.1f}".replace("-", "−")
        said.append(f"{name} {middle} points (at most {100 * max(rises):.0f})")
    return (
        f"Rise of the error when one step is deleted and nothing retrained, median over the steps: {', '.join(said)}. "
        "Where a residual net loses a block, half of its paths remain; a plain net has but one path; an ODE net loses "
        "that interval of its flow. The first steps of the second and third stage change the resolution; in the ODE "
        "net they are residual blocks, no part of a flow."
    )


def _what_steps_show(table: Mapping[str, Any]) -> str:
    solver, trained = table["trained"][0]
    by_steps = {e["steps"]: e for e in table["evaluations"]}
    own, finest = by_steps[trained], by_steps[max(by_steps)]
    return (
        f"Trained with {trained} steps of {solver} in each block (accuracy {own['accuracy']:.1%}) and evaluated, "
        f"as it is, with others (with {finest['steps']}: {finest['accuracy']:.1%}). At {trained} steps the logits are "
        f"{own['logit_error']:.1%} away from a reference solve of {table['reference_steps']} steps: a net near the "
        "flow of an ODE loses nothing on a finer grid."
    )
