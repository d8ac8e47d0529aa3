"""Is the loss of a net with norms smoother along its gradient than that of one without, and of which depth?

Residual nets and ODE nets are trained from the same recipe, with batch norm, group norm and without a norm. Before each
epoch, and at the end, the loss is followed along the gradients of some batches: how far it ranges, how fast the
gradient changes, and the effective β (Santurkar et al. 2018, arXiv 1805.11604, figure 4; see ``train.smoothness``).

    python -m experiments.smoothness cpu --publish results                      digits, 3 minutes
    python -m experiments.smoothness paper --data-dir data --publish results    CIFAR-10, a GPU
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from typing import Any

from experiments.common import main
from experiments.training import trained
from resode import nets
from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.nets import Architecture, Net
from resode.runs import Run
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup
from resode.train.smoothness import smoothness


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        nets: resnet, odenet.
        norms: norms of the stack: batch, group, none …
        depth: depth 6n + 2 of the residual net.
        steps: steps of each ODE block.
        solver: solver of each ODE block, with equal steps.
        width: channels of the first stage.
        epochs: of each training.
        batch_size: of each training, and of the measurement.
        lr: learning rate of each training.
        step_sizes: sizes of the steps along the gradient.
        batches: batches that are followed, of the training split.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    nets: tuple[str, ...] = ("resnet", "odenet")
    norms: tuple[str, ...] = ("batch", "group", "none")
    depth: int = 20
    steps: int = 2
    solver: str = "rk4"
    width: int = 8
    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.02
    step_sizes: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.08)
    batches: int = 4
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"

    def setup(self, net: str, norm: str, seed: int) -> Setup:
        """The training of one net from one seed."""
        return Setup(
            architecture=Architecture(
                net=net, depth=self.depth, width=self.width, kind="preact", solver=self.solver, steps=self.steps
            ),
            stack=Stack(norm=norm, augment=Augment(flip=self.flip, crop=self.crop)),
            data=Data(data=self.data, data_dir=self.data_dir),
            recipe=Recipe(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, warmup=1.0, seed=seed),
        )


CONFIGS = {
    "smoke": Config(
        norms=("batch", "none"), depth=8, solver="euler", width=4, epochs=1, batch_size=256, batches=1, seeds=(0, 1)
    ),
    "cpu": Config(),
    "paper": Config(
        data="cifar10",
        depth=56,
        steps=8,
        width=16,
        epochs=30,
        batch_size=128,
        lr=0.1,
        step_sizes=(0.025, 0.05, 0.1, 0.2, 0.4),
        batches=8,
        flip=True,
        crop=4,
        device="cuda",
    ),
}


def run(config: Config, out: Run) -> None:
    """Train each net with each norm from each seed, and look at its smoothness along the training."""
    for net, norm in product(config.nets, config.norms):
        found = [_train(config, net, norm, seed, out) for seed in config.seeds]
        out.save_result(f"{net}-{norm}", {"net": net, "norm": norm, "seeds": found})


def _train(config: Config, net: str, norm: str, seed: int, out: Run) -> dict[str, Any]:
    setup = config.setup(net, norm, seed)
    data = setup.data.load(seed, config.device)
    settings = setup.net_config(data)
    look = _Look(config, data)
    done = trained(
        out.path / "trainings" / f"{net}-{norm}-seed-{seed}",
        {
            "net": settings.to_dict(),
            "data": asdict(setup.data),
            "recipe": asdict(setup.recipe),
            "step_sizes": config.step_sizes,
            "batches": config.batches,
        },
        nets.build(settings, seed).to(config.device),
        data,
        setup.recipe,
        along=look,
        augment=setup.stack.augment,
        device=config.device,
    )
    scores = done["scores"]
    return {
        "seed": seed,
        "parameters": done["parameters"],
        "diverged": done["diverged"],
        "train_loss": [record["train_loss"] for record in done["records"]],
        "accuracy": scores and {name: score["accuracy"] for name, score in scores.items()},
        "epochs": _columns(done["along"]),
    }


class _Look:
    """Looks at the smoothness of a net on the first batches of the training split, the same each time."""

    def __init__(self, config: Config, data: DataSet) -> None:
        self.config, self.data = config, data

    def __call__(self, model: Net) -> dict[str, Any]:
        batches = islice(self.data.batches("train", self.config.batch_size), self.config.batches)
        found = smoothness(model, batches, self.config.step_sizes)
        return {name: getattr(found, name) for name in ("loss_range", "gradient_range", "beta")}


def _columns(looks: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What was seen before each epoch, and at the end, by its name."""
    return {name: [look[name] for look in looks] for name in looks[0]} if looks else {}


if __name__ == "__main__":
    main("smoothness", "Is the loss of a net with norms smoother along its gradient?", CONFIGS, run)
