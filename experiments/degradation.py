"""Are deeper plain nets worse even on the data they are trained on, and deeper residual nets not?

Plain and residual nets of the same depths, widths and recipe are trained from several seeds; the training and the test
error of every epoch is kept (He et al. 2016, arXiv 1512.03385, figures 1 and 6). Nothing is chosen by the test error:
all nets get the same recipe, and are looked at as they are at its end.

    python -m experiments.degradation cpu --data-dir data --publish results      MNIST, depths 20 and 56, an hour
    python -m experiments.degradation digits --publish results                   digits, depths 20 to 110, 8 minutes
    python -m experiments.degradation paper --data-dir data --publish results    CIFAR-10, depths 20 to 110, a GPU

(Times are those of a CPU core; MNIST's of one with AMX, beside other work.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.common import main
from experiments.training import trained
from resode import nets
from resode.data.augment import Augment
from resode.intervals import interval
from resode.nets import Architecture
from resode.runs import Run
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        nets: plain, resnet.
        depths: depths 6n + 2, of both.
        width: channels of the first stage.
        norm: normalization.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training, divided by 10 at half and at three quarters of it.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        half: train in bfloat16 and channels-last: for GPUs and CPUs with AMX.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    nets: tuple[str, ...] = ("plain", "resnet")
    depths: tuple[int, ...] = (20, 56, 110)
    width: int = 8
    norm: str = "batch"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    flip: bool = False
    crop: int = 0
    half: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"

    def setup(self, net: str, depth: int, seed: int) -> Setup:
        """The training of one net from one seed."""
        return Setup(
            architecture=Architecture(net=net, depth=depth, width=self.width),
            stack=Stack(norm=self.norm, augment=Augment(flip=self.flip, crop=self.crop)),
            data=Data(data=self.data, data_dir=self.data_dir, validation=0.0),
            recipe=Recipe(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                schedule="step",
                # He et al. begin at a tenth of the learning rate where the net is deep, for about an epoch.
                warmup=1.0,
                precision="bfloat16" if self.half else "float32",
                channels_last=self.half,
                seed=seed,
            ),
        )


CONFIGS = {
    "smoke": Config(depths=(8, 14), width=4, epochs=2, batch_size=256, seeds=(0, 1)),
    "cpu": Config(data="mnist", depths=(20, 56), epochs=3, batch_size=128, half=True),
    "digits": Config(),
    "paper": Config(
        data="cifar10",
        depths=(20, 32, 44, 56, 110),
        width=16,
        epochs=164,
        batch_size=128,
        flip=True,
        crop=4,
        device="cuda",
    ),
}


def run(config: Config, out: Run) -> None:
    """Train each net of each depth from each seed; what more depth does to the errors."""
    for net in config.nets:
        rows = [_row(config, net, depth, out) for depth in config.depths]
        out.save_result(net, {"depths": rows, "deeper": [_deeper(rows[0], row) for row in rows[1:]]})


def _row(config: Config, net: str, depth: int, out: Run) -> dict[str, Any]:
    """One net: its errors by epoch and at the end, for each seed, and the means of those at the end."""
    found = [_train(config, net, depth, seed, out) for seed in config.seeds]
    ends = [each["end"] for each in found]
    return {"depth": depth, "parameters": found[0]["parameters"], "seeds": found, "end": _means(ends)}


def _deeper(shallow: Mapping[str, Any], deep: Mapping[str, Any]) -> dict[str, Any]:
    """By how much the errors of ``deep`` are above those of ``shallow``, seed by seed."""
    pairs = [(a["end"], b["end"]) for a, b in zip(shallow["seeds"], deep["seeds"], strict=True)]
    rises = [a and b and {name: b[name] - a[name] for name in a} for a, b in pairs]
    return {"from": shallow["depth"], "to": deep["depth"], "rise": _means(rises)}


def _means(found: Sequence[Mapping[str, float] | None]) -> dict[str, Any] | None:
    """Mean and 95% interval over the seeds of each error; None where a training diverged."""
    if any(each is None for each in found):
        return None
    return {name: asdict(interval([each[name] for each in found])) for name in found[0]}


def _train(config: Config, net: str, depth: int, seed: int, out: Run) -> dict[str, Any]:
    setup = config.setup(net, depth, seed)
    data = setup.data.load(seed, config.device)
    # The loop tells the error on the validation split after every epoch, and the recipe decides nothing by it.
    watched = replace(data, validation=data.test)
    settings = setup.net_config(data)
    held = {"net": settings.to_dict(), "data": asdict(setup.data), "recipe": asdict(setup.recipe)}
    done = trained(
        out.path / "trainings" / f"{net}-{depth}-seed-{seed}",
        held,
        nets.build(settings, seed).to(config.device),
        watched,
        setup.recipe,
        augment=setup.stack.augment,
        device=config.device,
    )
    scores = done["scores"]
    return {
        "seed": seed,
        "parameters": done["parameters"],
        "diverged": done["diverged"],
        "train_error": [1 - record["train_accuracy"] for record in done["records"]],
        "test_error": [1 - record["validation_accuracy"] for record in done["records"]],
        "end": scores and {f"{name}_error": 1 - scores[name]["accuracy"] for name in ("train", "test")},
    }


if __name__ == "__main__":
    main("degradation", "Are deeper plain nets worse, and deeper residual nets not?", CONFIGS, run)
