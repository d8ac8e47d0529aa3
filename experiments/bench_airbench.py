"""How long does a training take to the accuracy of airbench94?

airbench94 (Jordan 2024, arXiv 2404.00498) trains a net of its own to 94 % on CIFAR-10 in seconds. Ours are residual
nets of several widths and lengths of training by the preset ``fast``, which has the means of airbench's training, but
not its net. All train on the same images, in turns: every contender from the first seed, then every one from the
second. Before, each has made steps on a few images: what is compiled or chosen by trial is ready.

Seconds are those of the training and the evaluation of its result on the test images (of an image and its mirror
image; of six views, in airbench), without reading the data and building the net. What is asked is which of ours is the
first to reach the mean accuracy of airbench, and how many times as long it takes.

airbench needs a GPU, and takes no part where there is none or it is not installed (``pip install airbench==0.1.8``).

    python -m experiments.bench_airbench cuda --data-dir data --publish results
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

import torch
from tqdm import tqdm

from experiments.bench import airbench
from experiments.bench.summary import ratio, spread
from experiments.common import main
from resode import nets
from resode.data.sets import DataSet
from resode.errors import InvalidInput, positive
from resode.nets.net import parameter_count
from resode.runs import Run
from resode.runs.environment import package_version
from resode.train.loop import EVALUATION_BATCH, fit
from resode.train.metrics import evaluate
from resode.train.presets import preset
from resode.train.session import Setup, check_device

AIRBENCH = "airbench94"
FEW = 2
"""Steps before the measured ones."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of ours: the preset ``fast``, of another size. The learning rate grows in proportion to the batch.

    Args:
        width: channels of the first stage of its ResNet-20.
        epochs: of the training.
        batch_size: images in a batch.

    Raises:
        InvalidInput: for numbers below 1.
    """

    width: int
    epochs: int
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            positive(getattr(self, name), name)

    @property
    def name(self) -> str:
        """Such as "width-32-epochs-16"."""
        return f"width-{self.width}-epochs-{self.epochs}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark.

    Args:
        entries: ours.
        data: cifar10, or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        compile: compile our nets by torch.compile.
        compile_mode: its mode.
        seeds: to train from; each contender has one turn with each.
        device: cpu, cuda, cuda:1.

    Raises:
        InvalidInput: without an entry or a seed, or with two entries of one name.
    """

    entries: tuple[Entry, ...] = (Entry(width=16, epochs=1),)
    data: str = "cifar10"
    data_dir: str = "data"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    seeds: tuple[int, ...] = (0, 1)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.entries or not self.seeds:
            raise InvalidInput(f"entries are {self.entries} and seeds {self.seeds}: at least one of each is expected")
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names):
            raise InvalidInput(f"entries are {', '.join(names)}: another width or another number of epochs each")

    def setup(self, entry: Entry, seed: int) -> Setup:
        """The training of ``entry`` from ``seed``."""
        start = preset("fast")
        recipe, epochs = start.recipe, entry.epochs
        return replace(
            start,
            architecture=replace(
                start.architecture, width=entry.width, compile=self.compile, compile_mode=self.compile_mode
            ),
            data=replace(start.data, data=self.data, data_dir=self.data_dir),
            recipe=replace(
                recipe,
                epochs=epochs,
                warmup=recipe.warmup * epochs / recipe.epochs,
                batch_size=entry.batch_size,
                lr=recipe.lr * entry.batch_size / recipe.batch_size,
                seed=seed,
            ),
        )


CONFIGS = {
    "smoke": Config(entries=(Entry(width=4, epochs=1),), data="digits"),
    "cpu": Config(),
    "cuda": Config(
        entries=tuple(
            Entry(width=width, epochs=epochs, batch_size=512)
            for width, epochs in ((32, 8), (32, 16), (64, 8), (64, 16), (64, 32))
        ),
        compile=True,
        seeds=(0, 1, 2),
        device="cuda",
    ),
}


def run(config: Config, out: Run) -> None:
    """A turn of every contender from every seed; then who reaches what, and when.

    What was measured before an interruption is kept.

    Raises:
        InvalidInput: for a device or data that are not there.
        TrainingError: when the loss of one of ours is no longer finite.
        Unreadable: when airbench speaks of its outcome in other words.
    """
    device = check_device(config.device)
    settings = config.setup(config.entries[0], config.seeds[0]).data
    data = settings.load(0, device)
    why = airbench.absent(data)
    if why is not None:
        print(f"{AIRBENCH} is skipped: {why}", flush=True)
    names = [*(entry.name for entry in config.entries), *([] if why else [AIRBENCH])]
    todo = [(seed, name) for seed in config.seeds for name in names if not _has(out, name, seed)]
    for name in dict.fromkeys(name for _, name in todo):
        _turn(config, data, name, config.seeds[0], warmup=True)
    for seed, name in tqdm(todo, desc="bench", unit="training", leave=False, disable=None):
        found = _turn(config, data, name, seed)
        out.save_result(_named(name, seed), {"contender": name, "seed": seed, **found})
        tqdm.write(f"{name}, seed {seed}: {found['accuracy']:.2%} in {found['seconds']:.2f} s")
    rows = {name: row([out.result(_named(name, seed)) for seed in config.seeds]) for name in names}
    version = None if why else package_version("airbench")
    out.save_result("bench", {AIRBENCH: version, "absent": why, "rows": rows, "to_accuracy": to_accuracy(rows)})
    out.write("table.md", said := table(rows))
    print(said)


def row(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy and seconds of one contender over its seeds."""
    seconds = [each["seconds"] for each in found]
    accuracies = [each["accuracy"] for each in found]
    return {
        "parameters": found[0]["parameters"],
        "accuracy": {"mean": mean(accuracies), "min": min(accuracies), "max": max(accuracies), "n": len(accuracies)},
        "seconds": spread(seconds),
        "rounds": seconds,
    }


def to_accuracy(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The quickest of ours whose mean accuracy is no less than airbench's, and the ratio of their seconds.

    Returns:
        "accuracy" to reach, "first" to reach it (None: none of ours does), and "ratio" of its seconds over airbench's;
        None where airbench took no part.
    """
    if AIRBENCH not in rows:
        return None
    theirs = rows[AIRBENCH]
    wanted = theirs["accuracy"]["mean"]
    there = [name for name, each in rows.items() if name != AIRBENCH and each["accuracy"]["mean"] >= wanted]
    first = min(there, key=lambda name: rows[name]["seconds"]["median"], default=None)
    return {"accuracy": wanted, "first": first, "ratio": None if first is None else ratio(rows[first], theirs)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """All of it, in Markdown."""
    lines = ["| who | parameters | test accuracy (range, n) | seconds (range) |", "|---|---|---|---|"]
    for name, each in rows.items():
        a, s = each["accuracy"], each["seconds"]
        size = "" if each["parameters"] is None else f"{each['parameters']:,}"
        right = f"{a['mean']:.2%} ({a['min']:.2%}–{a['max']:.2%}, {a['n']})"
        lines.append(f"| {name} | {size} | {right} | {s['median']:.2f} ({s['min']:.2f}–{s['max']:.2f}) |")
    found = to_accuracy(rows)
    if found is not None and found["first"] is not None:
        times = found["ratio"]
        lines += [
            "",
            f"The first of ours at {found['accuracy']:.2%} is {found['first']}, in {times['ratio']:.2f} times "
            f"({times['min']:.2f}–{times['max']:.2f}, {times['n']}) the seconds of {AIRBENCH}.",
        ]
    elif found is not None:
        lines += ["", f"None of ours reaches {found['accuracy']:.2%}."]
    return "\n".join(lines) + "\n"


def _named(name: str, seed: int) -> str:
    return f"{name}-seed-{seed}"


def _has(out: Run, name: str, seed: int) -> bool:
    return (out.path / "results" / f"{_named(name, seed)}.json").is_file()


def _turn(config: Config, data: DataSet, name: str, seed: int, warmup: bool = False) -> dict[str, Any]:
    """One training and evaluation; or, as a warm-up, a few steps of it."""
    device = data.train.inputs.device
    if name == AIRBENCH:
        with airbench.ready(data):
            found = airbench.train(seed, device, warmup)
        return {} if found is None else {"accuracy": found.accuracy, "seconds": found.seconds, "parameters": None}
    setup = config.setup(next(entry for entry in config.entries if entry.name == name), seed)
    recipe, some = setup.recipe, data
    if warmup:
        recipe = replace(recipe, epochs=1, warmup=0.0)
        some = replace(data, train=data.train.take(slice(FEW * recipe.batch_size)))
    model = nets.build(setup.net_config(data), recipe.seed).to(device)
    _wait(device)
    begin = time.perf_counter()
    fit(model, some, recipe, augment=setup.stack.augment, compile=setup.architecture.compiled)
    right = evaluate(model, data.batches("test", EVALUATION_BATCH), mirrored=recipe.mirrored).accuracy
    _wait(device)
    return {"accuracy": right, "seconds": time.perf_counter() - begin, "parameters": parameter_count(model)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main("bench_airbench", "How long does a training take to the accuracy of airbench94?", CONFIGS, run)
