"""What does a trained net do without some of its steps?

A residual net, the plain net of the same depth, both without any normalization, a VGG net, and the ODE net of the same
branch are trained alike, from several seeds. Then every step is deleted, one at a time; random sets of steps are
deleted; random pairs of steps are swapped; every stage is deleted; and random sub-networks are averaged (Veit, Wilber &
Belongie 2016, arXiv 1605.06431, section 4).

    python -m experiments.lesion cpu --publish results                      digits, 54 blocks, about 20 minutes
    python -m experiments.lesion cifar --data-dir data --publish results    CIFAR-10, 9 blocks
    python -m experiments.lesion paper --data-dir data --publish results    CIFAR-10, 54 blocks, a GPU
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.common import main
from resode.data.augment import Augment
from resode.data.dataset import Batches
from resode.dynamics.inference import inference
from resode.nets import Architecture
from resode.paths import lesion
from resode.paths.ensemble import subnetworks
from resode.paths.scores import Score
from resode.runs import Run
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, Trained, load, train

NETS = ("residual", "plain", "residual-without-norm", "plain-without-norm", "vgg", "ode")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        nets: which nets, of residual, plain, residual-without-norm, plain-without-norm, vgg, ode.
        depth: depth 6n + 2 of the residual and the plain nets.
        width: channels of the first stage.
        steps: steps of heun in each block of the ODE net.
        blocks, convs: of the VGG net.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training; a tenth of it for the plain net without norm.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from.
        samples: test samples on which lesions are measured; all if not given.
        most: the largest number of steps deleted at random, and of swaps.
        draws: random draws for each number.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    nets: tuple[str, ...] = NETS
    depth: int = 110
    width: int = 16
    steps: int = 4
    blocks: int = 2
    convs: int = 5
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int | None = None
    most: int = 20
    draws: int = 5
    device: str = "cpu"

    def setup(self, name: str, seed: int) -> Setup:
        """The training of one net from one seed."""
        bare = name.endswith("-without-norm")
        sizes = {"depth": self.depth, "width": self.width}
        net = {
            "residual": Architecture(net="resnet", kind="preact", **sizes),
            # Without a norm a branch of He's weights adds as much variance as there was; SkipInit lets it begin at 0.
            "residual-without-norm": Architecture(net="resnet", kind="preact", scale="skipinit", **sizes),
            "plain": Architecture(net="plain", **sizes),
            "plain-without-norm": Architecture(net="plain", **sizes),
            "vgg": Architecture(net="vgg", blocks=self.blocks, convs=self.convs),
            "ode": Architecture(net="odenet", kind="preact", width=self.width, solver="heun", steps=self.steps),
        }[name]
        lr = self.lr / 10 if name == "plain-without-norm" else self.lr
        return Setup(
            architecture=net,
            stack=Stack(norm="none" if bare else "batch", augment=Augment(flip=self.flip, crop=self.crop)),
            data=Data(data=self.data, data_dir=self.data_dir),
            recipe=Recipe(epochs=self.epochs, batch_size=self.batch_size, lr=lr, warmup=1.0, clip=1.0, seed=seed),
        )


_CIFAR = Config(data="cifar10", flip=True, crop=4, batch_size=128)
_SMALL = {"depth": 20, "steps": 2, "epochs": 3, "seeds": (0,), "samples": 2000, "most": 8}

CONFIGS = {
    "smoke": Config(depth=14, width=4, steps=2, convs=3, epochs=1, seeds=(0,), samples=64, most=2, draws=2),
    "cpu": Config(),
    "cifar": replace(_CIFAR, nets=tuple(net for net in NETS if net != "vgg"), **_SMALL),
    "paper": replace(_CIFAR, epochs=160, steps=8, blocks=5, convs=2, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Train each net from each seed, and make its lesions."""
    for name in config.nets:
        found = []
        for seed in config.seeds:
            folder = out.path / "trainings" / f"{name}-seed-{seed}"
            scores = train(config.setup(name, seed), folder, device=config.device, progress=True).result("train")
            trained = load(folder, device=config.device)
            whole = seed == config.seeds[0]
            found.append({"seed": seed, "training": scores, **_lesions(config, trained, out, f"{name}-{seed}", whole)})
        out.save_result(name, {"seeds": found, "classes": trained.data.classes})


def _lesions(config: Config, trained: Trained, out: Run, name: str, whole: bool) -> Mapping[str, Any]:
    """Every lesion of a net; if not ``whole``, the single deletions alone."""
    data = Batches(trained.data, "test", 256, config.samples)
    view = inference(trained.model, next(iter(data))[0][:2])

    def how(analysis: str) -> Mapping[str, Any]:
        return {"progress": True, "resume": out.path / "progress" / f"{name}-{analysis}.json"}

    found = {"single": _small(lesion.single(view, data, **how("single")))}
    if not whole:
        return found
    most = min(config.most, sum(step.not_deletable is None for step in view.steps))
    found["multiple"] = _small(lesion.multiple(view, data, most=most, draws=config.draws, **how("multiple")))
    found["permute"] = _small(lesion.permute(view, data, most=config.most, draws=config.draws, **how("permute")))
    found["stage"] = _small(lesion.stage(view, data, **how("stage")))
    if any(step.has_choice for step in view.steps):
        found["ensemble"] = subnetworks(view, data, progress=True).to_dict()
    return found


def _small(table: lesion.LesionTable) -> dict[str, Any]:
    """A table with no more than the figures draw, to five digits: thousands of lesions are published."""

    def score(found: Score | None) -> dict[str, Any] | None:
        return found and {"error": round(found.error, 5), "loss": round(found.loss, 5), "count": found.count}

    return {
        "analysis": table.analysis,
        "baseline": score(table.baseline),
        "lesions": [
            {
                "label": one.label,
                "stage": one.stage,
                "number": one.number,
                "tau": one.tau and round(one.tau, 5),
                "score": score(one.score),
            }
            for one in table.lesions
        ],
    }


if __name__ == "__main__":
    main("lesion", "What does a trained net do without some of its steps?", CONFIGS, run)
