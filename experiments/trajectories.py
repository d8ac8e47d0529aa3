"""How does an ODE net move the points of the plane to tell two classes apart?

A small ODE net is trained on scikit-learn's two moons; the paths of test points under its flow are recorded.

    python -m experiments.trajectories cpu --publish results                under a minute on 2 CPU cores
"""

from dataclasses import dataclass

import torch

from experiments.common import main
from resode.blocks.ode import ode_blocks
from resode.nets import Architecture
from resode.nets.net import evaluating
from resode.runs import Run
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, load, train


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: moons or circles.
        expansion: width of the branch over the 2 coordinates.
        steps: steps of rk4.
        points: test points to follow.
        times: number of times at which their place is recorded.
        epochs: of the training.
        seed: of the training.
        device: cpu, cuda, cuda:1.
    """

    data: str = "moons"
    expansion: float = 32.0
    steps: int = 8
    points: int = 120
    times: int = 33
    epochs: int = 30
    seed: int = 0
    device: str = "cpu"


CONFIGS = {
    "smoke": Config(expansion=4.0, steps=2, points=8, times=3, epochs=1),
    "cpu": Config(),
    "circles": Config(data="circles"),
}


def run(config: Config, out: Run) -> None:
    """Train, and record the paths of test points."""
    architecture = Architecture(net="odenet", kind="mlp", expansion=config.expansion, steps=config.steps)
    stack = Stack(norm="none", activation="tanh")
    recipe = Recipe(epochs=config.epochs, optimizer="adamw", lr=0.01, batch_size=64, seed=config.seed)
    setup = Setup(architecture=architecture, stack=stack, data=Data(data=config.data), recipe=recipe)
    folder = out.path / "training"
    score = train(setup, folder, device=config.device, progress=True).result("train")
    trained = load(folder, device=config.device)
    (block,) = ode_blocks(trained.model).values()
    x, labels = next(trained.data.batches("test", config.points))
    with evaluating(trained.model):
        paths = block.trajectory(x, torch.linspace(0.0, 1.0, config.times).tolist())
    out.save_result("trajectories", {"training": score, "paths": paths.tolist(), "labels": labels.tolist()})


if __name__ == "__main__":
    main("trajectories", "How does an ODE net move the points of the plane?", CONFIGS, run)
