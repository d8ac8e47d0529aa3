"""``resode evaluate``."""

from dataclasses import dataclass
from typing import Literal

import torch

from resode.blocks.multistep import MULTISTEP
from resode.cli.common import Folder, said_of, solved_by
from resode.errors import InvalidInput
from resode.train.loop import EVALUATION_BATCH
from resode.train.metrics import evaluate
from resode.train.montecarlo import MonteCarlo, check_samples, monte_carlo
from resode.train.recalibrate import recalibrate, statistics
from resode.train.session import Trained, load
from resode.train.sparsity import Pruned, prune_to_sparse


@dataclass(frozen=True)
class Evaluate:
    """Loss and accuracy of a trained net, an ODE net's with another solver if you like.

    Args:
        run_folder: folder of a run made by resode train.
        split: train, validation or test.
        solver: solve the ODE blocks with this solver; an embedded pair (dopri5, ...) chooses its steps.
        steps: with this many equal steps.
        rtol: with this relative tolerance, where steps are chosen; 0.001 if not given.
        atol: with this absolute tolerance, where steps are chosen; 0.001 if not given.
        recalibrate: first replace batch norm's running statistics by averages over the training set, without dropout
            and by that solver; the run keeps its own.
        prune: first set the smallest weights to 0, as many as this loss of validation accuracy permits (0: no loss);
            the run keeps its own.
        mc_samples: also average the answers under this many draws of the dropout masks (Monte Carlo dropout), and say
            how much they differ and how well the mean is calibrated.
        mc_seed: seed of these draws.
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    split: Literal["train", "validation", "test"] = "test"
    solver: str | None = None
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    recalibrate: bool = False
    prune: float | None = None
    mc_samples: int | None = None
    mc_seed: int = 0
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        if self.prune is not None and not 0.0 <= self.prune < 1.0:
            raise InvalidInput(f"prune is {self.prune}: an accuracy in [0, 1) that may be lost is expected")
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        # How a solve is differentiated means nothing here, and the multistep solvers do not have every way.
        plain = {"gradient": "backprop"} if self.solver in MULTISTEP else {}
        self._check(trained)
        with solved_by(trained.model, solver=self.solver, steps=self.steps, rtol=self.rtol, atol=self.atol, **plain):
            if self.recalibrate:
                order = torch.Generator().manual_seed(trained.run.config["recipe"]["seed"])
                recalibrate(trained.model, trained.data.batches("train", EVALUATION_BATCH, generator=order))
            if self.prune is not None:
                print(said_of_pruning(self._pruned(trained)))
            sampled = None
            if self.mc_samples is not None:
                batches = trained.data.batches(self.split, EVALUATION_BATCH)
                sampled = monte_carlo(trained.model, batches, self.mc_samples, self.mc_seed)
            batches = trained.data.batches(self.split, EVALUATION_BATCH)
            found = evaluate(trained.model, batches, mirrored=_mirrored(trained))
        print(f"{self.split}: {said_of(found.to_dict())}, NFE {found.nfe}")
        if sampled is not None:
            print(said_of_samples(sampled))

    def _check(self, trained: Trained) -> None:
        """Raise InvalidInput where something is asked for that this run cannot give, before anything is computed."""
        if self.recalibrate and not statistics(trained.model):
            raise InvalidInput("recalibrate given, and this net has no batch norm whose statistics it could replace")
        if self.prune is not None and not len(trained.data.validation):
            raise InvalidInput(
                "prune watches the accuracy on a validation split, and this run has none: train with --validation 0.1"
            )
        if self.mc_samples is not None:
            check_samples(trained.model, self.mc_samples)

    def _pruned(self, trained: Trained) -> Pruned:
        batches = trained.data.batches("validation", EVALUATION_BATCH)
        return prune_to_sparse(trained.model, batches, tolerance=self.prune, mirrored=_mirrored(trained))


def _mirrored(trained: Trained) -> bool:
    """Whether the run averages over mirror images wherever its net is evaluated."""
    return trained.run.config["recipe"].get("mirrored", False)


def said_of_pruning(found: Pruned) -> str:
    """How many weights are 0, and what that costs, in a line."""
    return (
        f"pruned: {found.sparsity:.2%} of {found.weights:,} weights are 0, accuracy on the validation split "
        f"{found.accuracy_after:.2%} (before {found.accuracy_before:.2%})"
    )


def said_of_samples(found: MonteCarlo) -> str:
    """Monte Carlo dropout beside the deterministic net, and what it does not know, in two lines."""
    mean, plain, values = found.of_mean, found.deterministic, found.to_dict()
    return (
        f"mean of {found.samples} masks: accuracy {mean.accuracy:.2%}, loss {mean.loss:.4f}, calibration error "
        f"{mean.calibration_error:.2%} (without dropout {plain.accuracy:.2%}, {plain.loss:.4f}, "
        f"{plain.calibration_error:.2%})\n"
        f"predictive entropy {values['entropy']:.4f} nats = {values['expected_entropy']:.4f} expected + "
        f"{values['mutual_information']:.4f} mutual information; predictive variance {values['variance']:.4f}"
    )
