"""``resode limits``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from resode import nets, plots
from resode.blocks.ode import ode_blocks
from resode.blocks.settings import check_count
from resode.cli.common import Folder, of_split
from resode.data.dataset import Batches
from resode.errors import InvalidInput
from resode.limits.certificate import Certificate, certificate
from resode.limits.convergence import ConvergenceTable, convergence
from resode.nets import NetConfig
from resode.report import png
from resode.runs import Run
from resode.train.loop import EVALUATION_BATCH
from resode.train.session import Trained, load


@dataclass(frozen=True)
class Limits:
    """What a trained net is as a dynamics in depth, and whether it is near an ODE.

    Args:
        run_folder: folder of a run made by resode train.
        analyses: convergence (of an ODE net: other numbers of steps against a fine reference solve), certificate (of
            any residual net: solver swaps, reconstruction, regularity in depth, distance from its ODE, identity bias,
            signal and gradient, and a verdict).
        steps: of convergence: numbers of steps in each ODE block; by default 1, 2, 4, ..., 64, or n, 2n, 4n, ... where
            weights jump or bend in t, with the least n whose grid has these points.
        solvers: of convergence: Runge-Kutta methods: euler, midpoint, heun, rk4, dopri5, ...; by default the one of the
            training, or rk4 where that has no fixed steps.
        samples: of certificate: samples for the solver swaps, evenly spaced over the split.
        few: of certificate: samples for the other parts.
        precision: of certificate: float64 tells small errors from rounding.
        split: train, validation or test.
        device: cpu, cuda, cuda:1.
        data_dir: folder of the data, if it is not where it was in training.
    """

    run_folder: Folder
    analyses: tuple[Literal["convergence", "certificate"], ...] = ("convergence", "certificate")
    steps: tuple[int, ...] = ()
    solvers: tuple[str, ...] = ()
    samples: int = 512
    few: int = 64
    precision: Literal["float32", "float64"] = "float32"
    split: Literal["train", "validation", "test"] = "test"
    device: str = "cpu"
    data_dir: str | None = None

    def run(self) -> None:
        trained = load(self.run_folder, device=self.device, data_dir=self.data_dir)
        if not ode_blocks(trained.model) and set(self.analyses) == {"convergence"}:
            raise InvalidInput(
                "convergence in the number of steps needs a net with ODE blocks, and this one has none: ask for its "
                "certificate, which lifts it"
            )
        check_count(self.samples, "samples")
        check_count(self.few, "few")
        with Run.open(self.run_folder, write=True) as run:
            if "convergence" in self.analyses and ode_blocks(trained.model):
                self._convergence(trained, run)
            if "certificate" in self.analyses:
                self._certificate(trained, run)

    def _convergence(self, trained: Trained, run: Run) -> None:
        data = trained.data.batches(self.split, EVALUATION_BATCH)
        table = convergence(trained.model, data, self.steps or None, self.solvers or None, progress=True)
        _say(_of_convergence(table))
        name = of_split("limits", self.split)
        print("Result:", run.save_result(name, table.to_dict()))
        print("Figure:", run.write(f"figures/{name}.png", png(plots.convergence(table.to_dict(), self.split))))

    def _certificate(self, trained: Trained, run: Run) -> None:
        config, seed = trained.run.config["net"], trained.run.config["recipe"]["seed"]
        found = certificate(
            trained.model,
            Batches(trained.data, self.split, EVALUATION_BATCH, max(self.samples, self.few)),
            initial=nets.build(NetConfig.from_dict(config), seed).to(self.device),
            samples=self.samples,
            few=self.few,
            dtype=torch.float64 if self.precision == "float64" else None,
            progress=True,
        )
        _say(_of_certificate(found))
        name = of_split("certificate", self.split)
        print("Result:", run.save_result(name, found.to_dict()))
        print("Figure:", run.write(f"figures/{name}.png", png(found.plot(config["net"]))))


def _say(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


def _of_convergence(table: ConvergenceTable) -> Iterator[str]:
    for e in table.evaluations:
        order = "" if e.order is None else f", order {e.order:.2f}"
        yield f"{e.solver:9s} {e.steps:4d} steps: accuracy {e.accuracy:.2%}, logits off by {e.logit_error:.2e}{order}"
    reference = f"{table.reference_solver} with {table.reference_steps} steps"
    yield f"reference, {reference}: accuracy {table.reference_accuracy:.2%}"


def _of_certificate(found: Certificate) -> Iterator[str]:
    if found.lifted:
        yield "The residual net is lifted: its blocks are the Euler steps of an ODE net between linear weights."
    if found.swap is not None:
        yield f"1  solver swaps, {found.swap.count} samples"
        for e in (*found.swap.evaluations, found.swap.reference):
            what = "reference" if e is found.swap.reference else e.solver
            steps = _range(e.steps)
            yield f"   {what:11s} {steps:>9s} steps: accuracy {e.accuracy:.2%}, logits off by {e.error:.2e}"
        if found.swap.critical_steps is not None:
            yield f"   {_range(found.swap.critical_steps)} steps or more keep the accuracy"
        else:
            yield "   no number of steps keeps the accuracy from there on"
    if found.reconstruction is not None:
        yield "2  reconstruction, with 1, 2, 4 times the steps"
        for block in found.reconstruction.blocks:
            errors = ", ".join(f"{e:.2e}" for e in block.errors)
            yield f"   {block.name:11s} {errors} (order {block.order} expected; rounding {block.rounding:.0e})"
    yield "3  regularity in depth"
    for stretch in found.regularity.stretches:
        rough = "" if stretch.roughness is None else f", weights change by {stretch.roughness:.2f} of their norm"
        yield (
            f"   stage {stretch.stage + 1}: {stretch.depth} steps of {stretch.relative_increment:.3f} of the state's "
            f"norm{rough}"
        )
    if found.distance is not None:
        yield "4  distance from the ODE"
        for block in found.distance.blocks:
            bound = "" if block.bound is None else f", bound {block.bound[-1] / block.states[-1]:.1e}"
            yield f"   {block.name:11s} states off by {block.relative[-1]:.2e} of their norm{bound}"
    yield "5  identity bias: the branch's share of the variance"
    yield f"   as it is: {_shares([step.share for step in found.bias.steps])}"
    if found.initial_bias is not None:
        yield f"   before training: {_shares([step.share for step in found.initial_bias.steps])}"
    yield "6  signal and gradient"
    states, gradients = found.signal.states, found.signal.gradients
    yield f"   norm of the state, first to last: {states[0]:.3g} to {states[-1]:.3g}"
    yield f"   norm of its gradient, last to first: {gradients[-1]:.3g} to {gradients[0]:.3g}"
    for stretch in found.lyapunov.stretches:
        rates = ", ".join(f"{rate:.2f}" for rate in stretch.exponents)
        yield f"   stage {stretch.stage + 1}: Lyapunov exponents {rates}"
    for part, why in found.missing:
        yield f"No {part}: {why}"
    yield found.verdict.words


def _range(steps: Sequence[int | None]) -> str:
    """Steps of the blocks, once if they are the same."""
    return "its own" if None in steps else "/".join(map(str, steps if len(set(steps)) > 1 else steps[:1]))


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{value:.0%}" for value in values)
