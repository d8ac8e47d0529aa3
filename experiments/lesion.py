"""What does a trained net do without one of its steps?

A residual net, the plain net of the same depth, and the ODE net of the same branch are trained alike, from several
seeds; then every step is deleted, one at a time (Veit, Wilber & Belongie 2016, arXiv 1605.06431, section 4.1).

    python -m experiments.lesion cpu --publish results                      digits, about 4 minutes on a CPU core
    python -m experiments.lesion paper --data-dir data --publish results    CIFAR-10, a GPU
"""

from dataclasses import dataclass

from experiments.common import main
from resode.data.augment import Augment
from resode.dynamics import dynamics
from resode.nets import Architecture
from resode.paths import lesion
from resode.runs import Run
from resode.stack import Stack
from resode.train.loop import EVALUATION_BATCH
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup, load, train


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 … or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        depth: depth 6n + 2 of the residual and the plain net.
        width: channels of the first stage.
        steps: steps of rk4 in each block of the ODE net.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    depth: int = 44
    width: int = 16
    steps: int = 4
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"

    def setups(self) -> dict[str, Setup]:
        """The training of each net, from the first seed."""
        nets = {
            "residual": Architecture(net="resnet", depth=self.depth, width=self.width, kind="preact"),
            "plain": Architecture(net="plain", depth=self.depth, width=self.width),
            "ode": Architecture(net="odenet", width=self.width, kind="preact", solver="rk4", steps=self.steps),
        }
        stack = Stack(augment=Augment(flip=self.flip, crop=self.crop))
        data = Data(data=self.data, data_dir=self.data_dir)
        return {name: Setup(architecture=net, stack=stack, data=data) for name, net in nets.items()}

    def recipe(self, seed: int) -> Recipe:
        return Recipe(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, warmup=1.0, seed=seed)


CONFIGS = {
    "smoke": Config(depth=8, width=4, steps=2, epochs=1, seeds=(0,)),
    "cpu": Config(),
    "paper": Config(data="cifar10", depth=110, steps=8, epochs=160, batch_size=128, flip=True, crop=4, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Train each net from each seed, and delete each of its steps."""
    for name, setup in config.setups().items():
        tables, scores = [], []
        for seed in config.seeds:
            one = Setup(architecture=setup.architecture, stack=setup.stack, data=setup.data, recipe=config.recipe(seed))
            folder = out.path / "trainings" / f"{name}-seed-{seed}"
            scores.append(train(one, folder, device=config.device, progress=True).result("train"))
            trained = load(folder, device=config.device)
            data = trained.data.batches("test", EVALUATION_BATCH)
            tables.append(lesion.single(dynamics(trained.model), data, progress=True).to_dict())
        out.save_result(name, {"trainings": scores, "lesions": tables, "classes": trained.data.classes})


if __name__ == "__main__":
    main("lesion", "What does a trained net do without one of its steps?", CONFIGS, run)
