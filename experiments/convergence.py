"""Is a trained ODE net the flow of an ODE, or has it fitted the steps it was trained with?

ODE nets are trained with a coarse Euler grid and with rk4 at the same number of evaluations of f, then evaluated with
other solvers and numbers of steps against a fine reference solve (Ott et al. 2021, arXiv 2007.15386).

    python -m experiments.convergence cpu --publish results                 digits, about 9 minutes on a CPU core
    python -m experiments.convergence paper --data-dir data --publish results     CIFAR-10, a GPU
"""

from dataclasses import dataclass

from experiments.common import main
from resode.limits.convergence import convergence
from resode.nets import Architecture
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
        width: channels of the first stage.
        trained: solver and steps of each training.
        solvers: solvers of the evaluations.
        steps: numbers of steps of the evaluations.
        norm: normalization.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training.
        seeds: seeds to train from.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    width: int = 16
    trained: tuple[tuple[str, int], ...] = (("euler", 4), ("rk4", 1), ("euler", 16), ("rk4", 4))
    solvers: tuple[str, ...] = ("euler", "midpoint", "rk4")
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    norm: str = "group"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"


CONFIGS = {
    "smoke": Config(width=4, trained=(("euler", 2),), solvers=("euler",), steps=(1, 2), epochs=1, seeds=(0,)),
    "cpu": Config(),
    "paper": Config(data="cifar10", trained=(("euler", 4), ("rk4", 4)), epochs=100, batch_size=128, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Train with each solver from each seed, and evaluate with every other."""
    for solver, steps in config.trained:
        name = f"{solver}-{steps}"
        architecture = Architecture(net="odenet", width=config.width, kind="preact", solver=solver, steps=steps)
        tables, scores = [], []
        for seed in config.seeds:
            recipe = Recipe(
                epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, warmup=1.0, clip=1.0, seed=seed
            )
            data = Data(data=config.data, data_dir=config.data_dir)
            setup = Setup(architecture=architecture, stack=Stack(norm=config.norm), data=data, recipe=recipe)
            folder = out.path / "trainings" / f"{name}-seed-{seed}"
            scores.append(train(setup, folder, device=config.device, progress=True).result("train"))
            trained = load(folder, device=config.device)
            test = trained.data.batches("test", EVALUATION_BATCH)
            tables.append(convergence(trained.model, test, config.steps, config.solvers, progress=True).to_dict())
        out.save_result(name, {"trainings": scores, "convergence": tables})


if __name__ == "__main__":
    question = "Is a trained ODE net the flow of an ODE, or has it fitted the steps it was trained with?"
    main("convergence", question, CONFIGS, run)
