"""Which paths carry the gradient, and is a net trained on as few steps as they have?

Residual nets and an ODE net are trained from several seeds; residual nets also on some of their blocks alone, drawn
anew for each batch (23 of 54 in Veit, Wilber & Belongie 2016, arXiv 1605.06431, section 4.3). The gradient of the loss
on test samples is then sorted by the length of its paths: exactly, and as Veit et al. sample it; before training and
after.

    python -m experiments.spectrum cpu --publish results                      digits, 54 blocks, about 20 minutes
    python -m experiments.spectrum paper --data-dir data --publish results    CIFAR-10, 54 blocks, a GPU
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from experiments.common import main
from resode import nets
from resode.data.augment import Augment
from resode.data.dataset import Batches
from resode.dynamics import ResidualDynamics, dynamics
from resode.nets import Architecture
from resode.paths import lengths, spectrum
from resode.runs import Run
from resode.stack import Stack
from resode.train import recalibrate
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, Trained, load, train

NETS = ("whole", "sampled", "ode")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        depth: depth 6n + 2 of the residual nets.
        width: channels of the first stage.
        active: blocks that are trained in each batch of the net "sampled".
        steps: steps of rk4 in each block of the ODE net.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from; the first one's nets have their spectra computed.
        samples: test samples whose gradient is taken.
        paths: single paths sampled for each length.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    depth: int = 110
    width: int = 16
    active: int = 23
    steps: int = 4
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 64
    paths: int = 16
    device: str = "cpu"

    def setup(self, name: str, seed: int) -> Setup:
        """The training of one net from one seed."""
        residual = Architecture(net="resnet", depth=self.depth, width=self.width, kind="preact")
        ode = Architecture(net="odenet", width=self.width, kind="preact", solver="rk4", steps=self.steps)
        return Setup(
            architecture=ode if name == "ode" else residual,
            stack=Stack(augment=Augment(flip=self.flip, crop=self.crop)),
            data=Data(data=self.data, data_dir=self.data_dir),
            recipe=Recipe(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                warmup=1.0,
                active_steps=self.active if name == "sampled" else None,
                seed=seed,
            ),
        )


_CIFAR = Config(data="cifar10", flip=True, crop=4, batch_size=128)

CONFIGS = {
    "smoke": Config(depth=14, width=4, active=3, steps=2, epochs=1, seeds=(0,), samples=8, paths=2),
    "cpu": Config(),
    "paper": replace(_CIFAR, epochs=160, steps=8, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Train every net, and sort the gradient of the first seed's by path length."""
    for name in NETS:
        scores = []
        for seed in config.seeds:
            folder = out.path / "trainings" / f"{name}-seed-{seed}"
            done = train(config.setup(name, seed), folder, device=config.device, progress=True)
            scores.append(done.result("train"))
        trained = load(out.path / "trainings" / f"{name}-seed-{config.seeds[0]}", device=config.device)
        out.save_result(name, {"trainings": scores, **_spectra(config, name, trained)})


def _spectra(config: Config, name: str, trained: Trained) -> dict[str, Any]:
    """The spectra of a net as it was trained; of the residual net also before training, and step by step."""
    x, labels = next(iter(Batches(trained.data, "test", config.samples, config.samples)))

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")

    view = dynamics(trained.model, x[:2])
    found = {"trained": _spectrum(config, view, x, loss)}
    if name == "ode":
        found["evaluations"] = {"exact": spectrum.gradient(view, x, loss, grade="evaluation").to_dict()}
    if name == "whole":
        found["by_step"] = spectrum.by_step(view, x, loss).to_dict()
        setup = config.setup(name, config.seeds[0])
        fresh = nets.build(setup.net_config(trained.data), config.seeds[0]).to(x.device)
        # Running statistics as in training's first step: without them a batch norm would do nothing yet.
        recalibrate(fresh, Batches(trained.data, "train", 512))
        found["before"] = _spectrum(config, dynamics(fresh, x[:2]), x, loss)
    return found


def _spectrum(config: Config, view: ResidualDynamics, x: Tensor, loss: spectrum.Loss) -> Mapping[str, Any]:
    exact, sampled = spectrum.gradient(view, x, loss), spectrum.sampled(view, x, loss, config.paths)
    effective = lengths.effective(sampled.totals, sampled.counts)
    return {"exact": exact.to_dict(), "sampled": sampled.to_dict(), "effective": effective.to_dict()}


if __name__ == "__main__":
    main("spectrum", "Which paths carry the gradient?", CONFIGS, run)
