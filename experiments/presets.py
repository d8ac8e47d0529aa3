"""What do the presets reach, and in what time?

Each case is a preset of ``resode.train.presets`` as it is, or one of its kin: the discrete counterpart of the ODE net,
another net of the lecture's grid. Test error is that of the last epoch; where a preset has no validation split, nothing
was chosen by looking at it.

    python -m experiments.presets mnist --data-dir data --publish results      MNIST, 45 minutes
    python -m experiments.presets cifar --data-dir data --publish results      CIFAR-10, half an hour
    python -m experiments.presets cpu --data-dir data --publish results        both of these
    python -m experiments.presets lecture --data-dir data --publish results    CIFAR-10, an hour of one core
    python -m experiments.presets paper --data-dir data --publish results      CIFAR-10, a GPU

(Times are those of 2 CPU cores with AMX.)
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from experiments.common import main
from resode.errors import choose
from resode.runs import Run
from resode.train.presets import preset
from resode.train.session import Setup, train


def _counterpart() -> Setup:
    """The residual net beside the ODE net for MNIST: the same branch, as the blocks of a ResNet-14."""
    setup = preset("odenet-mnist")
    return replace(setup, architecture=replace(setup.architecture, net="resnet", depth=14, time="none"))


def _vgg(blocks: int, convs: int) -> Callable[[], Setup]:
    def setup() -> Setup:
        start = preset("lecture")
        return replace(start, architecture=replace(start.architecture, blocks=blocks, convs=convs))

    return setup


CASES: dict[str, Callable[[], Setup]] = {
    **{name: lambda name=name: preset(name) for name in ("he2016", "fast", "strikes-back-a3", "odenet-mnist")},
    "resnet-mnist": _counterpart,
    **{f"vgg-{blocks}x{convs}": _vgg(blocks, convs) for blocks in (1, 2, 3) for convs in (1, 2, 3)},
}
GRID = tuple(name for name in CASES if name.startswith("vgg"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        cases: he2016, fast, strikes-back-a3, odenet-mnist, resnet-mnist; vgg-BLOCKSxCONVS, each from 1 to 3.
        mnist: data set in the place of MNIST.
        cifar10: data set in the place of CIFAR-10: imagefolder:PATH, perhaps.
        data_dir: folder of torchvision's data sets.
        epochs: of each training, and its warm-up shortened as much; the preset's own if not given.
        compile: compile the nets by torch.compile.
        half: train in bfloat16 and channels-last, whatever the preset does: for GPUs and CPUs with AMX.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.

    Raises:
        InvalidInput: for an unknown case.
    """

    cases: tuple[str, ...]
    mnist: str = "mnist"
    cifar10: str = "cifar10"
    data_dir: str = "data"
    epochs: int | None = None
    compile: bool = False
    half: bool = False
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"

    def __post_init__(self) -> None:
        for case in self.cases:
            choose(case, CASES, "case")

    def setup(self, case: str, seed: int) -> Setup:
        """The training of ``case`` from ``seed``."""
        setup = CASES[case]()
        recipe = setup.recipe
        if self.half:
            recipe = replace(recipe, precision="bfloat16", channels_last=True)
        epochs = recipe.epochs if self.epochs is None else self.epochs
        name = {"mnist": self.mnist, "cifar10": self.cifar10}[setup.data.data]
        return replace(
            setup,
            architecture=replace(setup.architecture, compile=self.compile),
            data=replace(setup.data, data=name, data_dir=self.data_dir),
            recipe=replace(recipe, epochs=epochs, warmup=recipe.warmup * epochs / recipe.epochs, seed=seed),
        )


CONFIGS = {
    "smoke": Config(cases=("odenet-mnist", "vgg-1x1"), mnist="digits", cifar10="digits", epochs=1, seeds=(0, 1)),
    "cpu": Config(cases=("resnet-mnist", "odenet-mnist", "fast")),
    "mnist": Config(cases=("resnet-mnist", "odenet-mnist")),
    "cifar": Config(cases=("fast",), compile=True),
    "lecture": Config(cases=GRID, half=True),
    "paper": Config(
        cases=("he2016", "fast", "strikes-back-a3", *GRID), compile=True, seeds=(0, 1, 2, 3, 4), device="cuda"
    ),
}


def run(config: Config, out: Run) -> None:
    """Train each case from each seed."""
    for case in config.cases:
        found = [_train(config, case, seed, out) for seed in config.seeds]
        errors = [each["test_error"] for each in found]
        out.save_result(
            case,
            {
                "case": case,
                "setup": asdict(config.setup(case, config.seeds[0])),
                "seeds": found,
                "test_error": {
                    "mean": mean(errors),
                    "sd": stdev(errors) if len(errors) > 1 else None,
                    "n": len(errors),
                },
            },
        )


def _train(config: Config, case: str, seed: int, out: Run) -> dict[str, Any]:
    folder = out.path / "trainings" / f"{case}-seed-{seed}"
    done = train(config.setup(case, seed), folder, device=config.device, progress=True)
    found, records = done.result("train"), done.metrics()
    return {
        "seed": seed,
        "test_error": 1.0 - found["test"]["accuracy"],
        "test_loss": found["test"]["loss"],
        "count": found["test"]["count"],
        "parameters": found["parameters"],
        "nfe": found["nfe"],
        "seconds": found["seconds"],
        "train_loss": [record["train_loss"] for record in records],
    }


if __name__ == "__main__":
    main("presets", "What do the presets reach, and in what time?", CONFIGS, run)
