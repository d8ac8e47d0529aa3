"""``resode limits``."""

from dataclasses import dataclass
from typing import Literal

from resode import plots
from resode.cli.common import Folder, of_split
from resode.limits.convergence import convergence
from resode.report import png
from resode.runs import Run
from resode.train.loop import EVALUATION_BATCH
from resode.train.session import load


@dataclass(frozen=True)
class Limits:
    """Evaluate a trained ODE net with other numbers of steps, against a fine reference solve.

    Args:
        run_folder: folder of a run made by resode train.
        steps: numbers of steps in each ODE block.
        solvers: Runge-Kutta methods: euler, midpoint, heun, rk4, dopri5, ...; by default the one of the
            training, or rk4 where that has no fixed steps.
        split: train, validation or test.
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    solvers: tuple[str, ...] = ()
    split: Literal["train", "validation", "test"] = "test"
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        data = trained.data.batches(self.split, EVALUATION_BATCH)
        table = convergence(trained.model, data, self.steps, self.solvers or None, progress=True)
        for e in table.evaluations:
            order = "" if e.order is None else f", order {e.order:.2f}"
            print(
                f"{e.solver:9s} {e.steps:4d} steps: accuracy {e.accuracy:.2%}, logits off by {e.logit_error:.2e}{order}"
            )
        print(f"reference, rk4 with {table.reference_steps} steps: accuracy {table.reference_accuracy:.2%}")
        with Run.open(self.run_folder, write=True) as run:
            print("Result:", run.save_result(of_split("limits", self.split), table.to_dict()))
            picture = plots.convergence(table.to_dict(), self.split)
            print("Figure:", run.write(f"figures/{of_split('limits', self.split)}.png", png(picture)))
