"""Does the trainer reach what a plain loop reaches, with the same net on the same files?

He et al.'s training (``resode.train.presets.he2016``) by ``fit``, and by a loop as most people write it with torch and
torchvision (``experiments.bench.plain_loop``): a ``DataLoader`` that crops and mirrors PIL images, and SGD that decays
every parameter, those of the norms included. Both train on all training images and are looked at after the last epoch;
they share the net's code and the learning rate of each step, and no seed. What is asked is whether the 95 % interval
of the difference of their mean test errors (Welch's) lies within a margin.

    python -m experiments.loop_parity cpu --data-dir data --publish results      MNIST, a ResNet-8, 12 minutes
    python -m experiments.loop_parity paper --data-dir data --publish results    CIFAR-10, a ResNet-20, a GPU
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy import stats

from experiments.bench.plain_loop import train_plainly
from experiments.common import main
from resode import nets
from resode.data.sets import DataSet
from resode.errors import InvalidInput, positive
from resode.intervals import interval
from resode.runs import Run
from resode.train.loop import EVALUATION_BATCH
from resode.train.metrics import evaluate
from resode.train.presets import preset
from resode.train.recipe import learning_rate
from resode.train.session import Setup, train

APART = 1_000
"""Between the seeds of the plain loop and those of the trainer: they draw nothing alike."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        depth: depth 6n + 2 of the residual net.
        width: channels of its first stage.
        epochs: of each training.
        batch_size: of each training.
        margin: two mean test errors that differ by less count as the same, as a share.
        seeds: as many trainings of each.
        workers: processes of the plain loop's DataLoader.
        device: cpu, cuda, cuda:1.

    Raises:
        InvalidInput: for fewer than two seeds, or a margin that is not above 0.
    """

    data: str = "cifar10"
    data_dir: str = "data"
    depth: int = 20
    width: int = 16
    epochs: int = 164
    batch_size: int = 128
    margin: float = 0.004
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive(self.margin, "margin")
        if len(self.seeds) < 2:
            raise InvalidInput(f"seeds are {self.seeds}: an interval needs at least two")

    def setup(self, seed: int) -> Setup:
        """The training from ``seed``."""
        start = preset("he2016")
        return replace(
            start,
            architecture=replace(start.architecture, depth=self.depth, width=self.width),
            data=replace(start.data, data=self.data, data_dir=self.data_dir),
            recipe=replace(start.recipe, epochs=self.epochs, batch_size=self.batch_size, seed=seed),
        )


CONFIGS = {
    "smoke": Config(data="digits", depth=8, width=4, epochs=1, batch_size=512, seeds=(0, 1)),
    "cpu": Config(data="mnist", depth=8, width=8, epochs=3),
    "paper": Config(workers=8, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Train the net in both ways from every seed, and compare their test errors."""
    found = {way: [once(config, seed, out) for seed in config.seeds] for way, once in WAYS.items()}
    for way, trainings in found.items():
        errors = [training["test_error"] for training in trainings]
        out.save_result(way, {"seeds": trainings, "test_error": asdict(interval(errors))})
    out.save_result(
        "difference", difference(*([t["test_error"] for t in each] for each in found.values()), config.margin)
    )


def difference(ours: Sequence[float], plain: Sequence[float], margin: float) -> dict[str, Any]:
    """Mean of ``ours`` less that of ``plain``, its 95 % interval by Welch's t, and whether it lies within ± margin."""
    test = stats.ttest_ind(ours, plain, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return {
        "mean": sum(ours) / len(ours) - sum(plain) / len(plain),
        "low": float(low),
        "high": float(high),
        "margin": margin,
        "within": bool(-margin < low and high < margin),
    }


def _ours(config: Config, seed: int, out: Run) -> dict[str, Any]:
    done = train(config.setup(seed), out.path / "trainings" / f"resode-{seed}", device=config.device, progress=True)
    found = done.result("train")
    return _row(seed, found["test"]["accuracy"], found["parameters"], done.metrics())


def _plainly(config: Config, seed: int, out: Run) -> dict[str, Any]:
    setup = config.setup(seed + APART)
    data: DataSet = setup.data.load(seed, config.device)
    settings, recipe = setup.net_config(data), setup.recipe
    steps = len(data.train) // recipe.batch_size
    held = {"net": settings.to_dict(), "data": asdict(setup.data), "recipe": asdict(recipe), "workers": config.workers}
    with Run.create(out.path / "trainings" / f"plain-{seed}", held, device=config.device) as folder:
        if not folder.done:
            model = nets.build(settings, recipe.seed)
            records = train_plainly(
                model,
                data,
                epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr_of_step=lambda step: learning_rate(recipe, step, steps),
                weight_decay=recipe.weight_decay,
                momentum=recipe.momentum,
                workers=config.workers,
                seed=recipe.seed,
                device=config.device,
                progress=True,
            )
            accuracy = evaluate(model.eval(), data.batches("test", EVALUATION_BATCH)).accuracy
            folder.save_result("train", _row(seed + APART, accuracy, nets.parameter_count(model), records))
            folder.finish()
        return folder.result("train")


def _row(seed: int, accuracy: float, parameters: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "seed": seed,
        "test_error": 1.0 - accuracy,
        "parameters": parameters,
        "train_loss": [record["train_loss"] for record in records],
        "seconds": sum(record["seconds"] for record in records),
    }


WAYS = {"resode": _ours, "plain": _plainly}


if __name__ == "__main__":
    main("loop_parity", "Does the trainer reach what a plain loop reaches?", CONFIGS, run)
