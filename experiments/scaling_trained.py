"""Which factors L^(−β) of residual branches can be trained at any depth L, and what becomes of the weights?

Nets of one stage of L equal blocks, without a norm, are trained at several depths, from weights that are independent
from block to block or smooth in depth, and with SkipInit. Do they train at all? And do their weights and the
increments of the state scale with the depth as those of an ODE, of a diffusion, or of neither (Cohen et al. 2021, arXiv
2105.12245; Marion et al. 2022, arXiv 2206.06929)? What training changes in the weights is looked at by itself, too: the
weights it begins with would hide it.

    python -m experiments.scaling_trained cpu --publish results      digits as vectors, to 64 blocks; 5 minutes
    python -m experiments.scaling_trained paper --data-dir data --publish results     CIFAR-10, convolutions, a GPU
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import main
from experiments.training import trained
from resode.blocks import Branch, ResidualBlock
from resode.data.augment import Augment
from resode.data.sets import DataSet
from resode.dynamics import dynamics
from resode.limits.draws import DepthDraws
from resode.limits.exponents import fit_exponent
from resode.limits.regime import regime
from resode.limits.regularity import Regularity, regularity
from resode.limits.stages import SKIPINIT
from resode.nets import Net
from resode.runs import Run
from resode.seeding import seeded
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data

CASES = (("0", "iid"), ("0.5", "iid"), ("1", "iid"), ("0.5", "smooth"), ("1", "smooth"), (SKIPINIT, "iid"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        cases: pairs of β (or skipinit) and the course of the weights over depth at the start: iid, smooth, tied.
        optimizers: pairs of an optimizer (sgd, adamw) and its learning rate.
        kind: residual branch: mlp for images as vectors, preact for images.
        width: channels.
        norm: norm of the branches.
        blocks: the L.
        epochs: of each training.
        batch_size: of each training.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    cases: tuple[tuple[str, str], ...] = CASES
    optimizers: tuple[tuple[str, float], ...] = (("sgd", 0.05), ("adamw", 0.002))
    kind: str = "mlp"
    width: int = 32
    norm: str = "none"
    blocks: tuple[int, ...] = (4, 8, 16, 32, 64)
    epochs: int = 10
    batch_size: int = 64
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"

    def recipe(self, optimizer: str, lr: float, seed: int) -> Recipe:
        """The recipe of one training."""
        return Recipe(epochs=self.epochs, batch_size=self.batch_size, optimizer=optimizer, lr=lr, warmup=1.0, seed=seed)


CONFIGS = {
    "smoke": Config(
        cases=(("0", "iid"), ("1", "smooth")),
        optimizers=(("sgd", 0.05),),
        width=4,
        blocks=(2, 4, 8, 16, 32),
        epochs=1,
        batch_size=256,
        seeds=(0, 1),
    ),
    "cpu": Config(),
    "paper": Config(
        data="cifar10",
        kind="preact",
        width=16,
        blocks=(8, 16, 32, 64, 128),
        epochs=30,
        batch_size=128,
        flip=True,
        crop=4,
        device="cuda",
    ),
}


def run(config: Config, out: Run) -> None:
    """Train each case with each optimizer, at each depth, from each seed."""
    for (beta, weights), (optimizer, lr) in product(config.cases, config.optimizers):
        name = f"{optimizer}-{beta}-{weights}"
        found = []
        for seed, blocks in product(config.seeds, config.blocks):
            folder = out.path / "trainings" / f"{name}-{blocks}-seed-{seed}"
            recipe = config.recipe(optimizer, lr, seed)
            found.append({"seed": seed, "blocks": blocks, **_train(config, beta, weights, blocks, recipe, folder)})
        result = {
            "beta": beta,
            "weights": weights,
            "optimizer": optimizer,
            "lr": lr,
            "trainings": [_summary(each) for each in found],
            "before": _regime(found, "before"),
            "after": _regime(found, "after"),
            "update": _update(found),
        }
        out.save_result(name, result)


def _train(config: Config, beta: str, weights: str, blocks: int, recipe: Recipe, folder: Path) -> dict[str, Any]:
    data = Data(data=config.data, data_dir=config.data_dir).load(recipe.seed, config.device)
    model = _net(config, beta, weights, blocks, recipe.seed, data).to(config.device)
    names = ("data", "kind", "width", "norm", "flip", "crop")
    held = {name: getattr(config, name) for name in names} | {"beta": beta, "weights": weights, "blocks": blocks}
    return trained(
        folder,
        {**held, "recipe": asdict(recipe)},
        model,
        data,
        recipe,
        measure=_Look(model, data),
        augment=Augment(flip=config.flip, crop=config.crop),
        device=config.device,
    )


def _net(config: Config, beta: str, weights: str, blocks: int, seed: int, data: DataSet) -> Net:
    """A stem, one stage of blocks of the same shape, and a head."""
    stack, width = Stack(norm=config.norm), config.width
    scale = beta if beta == SKIPINIT else blocks ** -float(beta)
    with seeded(seed):
        stage = [
            ResidualBlock(Branch(width, stack, config.kind, expansion=1.0), scale=scale, t=index / blocks)
            for index in range(blocks)
        ]
        if config.kind == "mlp":
            stem = nn.Sequential(nn.Flatten(), nn.Linear(data.train.inputs[0].numel(), width))
            head = nn.Sequential(nn.Linear(width, data.classes))
        else:
            stem = nn.Sequential(stack.conv_layer(data.channels, width, 3))
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, data.classes))
    draws = DepthDraws(stage[0].branch, blocks, weights, seed)
    for index, block in enumerate(stage):
        draws.load(block.branch, index)
    net = Net(stem, [nn.Sequential(*stage)], head)
    net.input_shape = tuple(data.train.inputs.shape[1:])
    return net


class _Look:
    """Looks at a net: its regularity on held-out samples, and how its weights have moved since it was made."""

    def __init__(self, model: Net, data: DataSet) -> None:
        self.data, self.start = data, _weights(model)

    def __call__(self, model: Net) -> dict[str, Any]:
        update = _weights(model) - self.start
        size = update.norm(dim=1)
        steps = torch.stack([b - a for a, b in pairwise(update)]).norm(dim=1) if len(update) > 1 else size.new_zeros(1)
        found = {
            "size": float(size.square().mean().sqrt()),
            "roughness": float(steps.square().mean().sqrt() / size.square().mean().sqrt()) if size.any() else 0.0,
            "coherence": float(update.sum(0).norm() / size.sum()) if size.any() else 0.0,
        }
        seen = regularity(dynamics(model), self.data.batches("validation", 64), samples=64)
        return {"regularity": seen.to_dict(), "update": found}


def _weights(model: Net) -> Tensor:
    """The weights of every block as a vector, (L, P)."""
    blocks = model.stages[0]
    return torch.stack([torch.cat([p.detach().flatten().double() for p in b.branch.parameters()]) for b in blocks])


def _summary(training: Mapping[str, Any]) -> dict[str, Any]:
    """What is published of a training."""
    scores, after = training["scores"], training["after"]
    return {
        "seed": training["seed"],
        "blocks": training["blocks"],
        "diverged": training["diverged"],
        "scores": scores,
        "train_loss": [record["train_loss"] for record in training["records"]],
        "update": after and after["update"],
        "before": _regular(training["before"]),
        "after": after and _regular(after),
    }


def _regular(look: Mapping[str, Any]) -> dict[str, float | None]:
    (stretch,) = Regularity.from_dict(look["regularity"]).stretches
    names = ("relative_increment", "roughness", "coherence", "displacement", "length", "quadratic")
    return {name: getattr(stretch, name) for name in names}


def _regime(trainings: Sequence[Mapping[str, Any]], when: str) -> dict[str, Any] | None:
    """The regime of the nets; None where some training diverged."""
    if any(each[when] is None for each in trainings):
        return None
    found: dict[int, dict[int, Regularity]] = {}
    for each in trainings:
        found.setdefault(each["seed"], {})[each["blocks"]] = Regularity.from_dict(each[when]["regularity"])
    return regime(found).stretches[0].to_dict()


def _update(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The exponents of what training changed in the weights; None where some training diverged."""
    if any(each["after"] is None for each in trainings):
        return None
    exponents = {}
    for name in ("size", "roughness", "coherence"):
        found: dict[int, dict[int, float]] = {}
        for each in trainings:
            found.setdefault(each["seed"], {})[each["blocks"]] = each["after"]["update"][name]
        exponent = fit_exponent(found)
        exponents[name] = exponent and asdict(exponent)
    return exponents


if __name__ == "__main__":
    main("scaling_trained", "Which factors of residual branches can be trained at any depth?", CONFIGS, run)
