"""``resode lesion``."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from resode.cli.common import Flat
from resode.cli.subject import Look, Subject
from resode.errors import NoSuchSteps
from resode.paths import lesion
from resode.paths.ensemble import EnsembleTable, subnetworks
from resode.paths.scores import Score
from resode.paths.table import LesionTable
from resode.report import png
from resode.runs import digest

Analysis = Literal["single", "multiple", "permute", "stage", "layer", "ensemble"]
USUAL: tuple[Analysis, ...] = ("single", "multiple", "permute")


@dataclass(frozen=True)
class Lesion:
    """What a network does without some of its steps: error by the step deleted, by the number of random steps deleted,
    and by how much random swaps put the steps out of order (Veit et al. 2016).

    Example: resode lesion torchvision:resnet50 --weights DEFAULT --data imagefolder:PATH --limit 5000

    Interrupted, it goes on where it stopped when the same command is given again.

    Args:
        analyses: single (each step deleted in turn), multiple (random sets of steps), permute (random swaps of steps of
            one shape), stage (each stage), layer (each layer without a shortcut), ensemble (averaged sub-networks); if
            not given, the first three, as far as the network has steps for them.
        most: of multiple and permute: the largest number of steps deleted, or of swaps.
        draws: of multiple and permute: random draws for each number.
        seed: of the draws.
        by_class: keep the error of each class, too.
        streams: lesioned networks that run at once, stacked in the batch; chosen by the device if not given.
    """

    subject: Annotated[Subject, Flat]
    analyses: tuple[Analysis, ...] | None = None
    most: int | None = None
    draws: int = 5
    seed: int = 0
    by_class: bool = False
    streams: int | None = None

    def run(self) -> None:
        whole = None
        with self.subject.open() as look:
            for analysis in USUAL if self.analyses is None else self.analyses:
                try:
                    whole = self._analyse(look, analysis)
                except NoSuchSteps as problem:
                    if self.analyses is not None:
                        raise
                    print(f"{analysis} is left out: {problem}")
        if whole is not None:
            print(_said("nothing deleted", whole))

    def _analyse(self, look: Look, analysis: str) -> Score:
        """Make one analysis, say and save what it finds; the score of the network as it is."""
        if analysis == "ensemble":
            found = self._ensemble(look)
            _say_ensemble(found)
            print("Result:", look.run.save_result(self.subject.result("ensemble"), found.to_dict()))
            return found.whole
        table = self._table(look, analysis)
        name = self.subject.result("lesion" if analysis == "single" else f"lesion-{analysis}")
        SAYS[analysis](table)
        print("Result:", look.run.save_result(name, table.to_dict()))
        print("Figure:", look.run.write(f"figures/{name}.png", png(table.plot(look.name, look.chance))))
        return table.baseline

    def _table(self, look: Look, analysis: str) -> LesionTable:
        settings: dict[str, Any] = {"by_class": self.by_class}
        if analysis in ("multiple", "permute"):
            settings |= {"most": self.most, "draws": self.draws, "seed": self.seed}
        # The progress file of other settings is another file.
        asked = [analysis, settings, self.subject.split, self.subject.limit, self.subject.precision]
        resume = look.run.path / "progress" / f"lesion-{analysis}-{digest(asked)}.json"
        analyse = getattr(lesion, analysis)
        return analyse(look.view, look.batches, **settings, streams=self.streams, progress=True, resume=resume)

    def _ensemble(self, look: Look) -> EnsembleTable:
        return subnetworks(
            look.view, look.batches, seed=self.seed, by_class=self.by_class, streams=self.streams, progress=True
        )


def _say_steps(table: LesionTable) -> None:
    for one in table.lesions:
        place = f"step {one.steps[0]:3d}  " if table.analysis in ("single", "layer") else ""
        said = "cannot be deleted" if one.score is None else _said("", one.score)
        print(f"{place}{one.label:18s} {said}")


def _say_draws(table: LesionTable) -> None:
    """The mean over the draws of each number."""
    numbers = sorted({one.number for one in table.lesions})
    for number in numbers:
        found = [one for one in table.lesions if one.number == number]
        error = sum(one.score.error for one in found) / len(found)
        tau = "" if found[0].tau is None else f", τ {sum(one.tau for one in found) / len(found):.2f}"
        what = "deleted" if table.analysis == "multiple" else "swaps"
        print(f"{number:3d} {what}: error {error:.2%}, mean of {len(found)} draws{tau}")


def _say_ensemble(table: EnsembleTable) -> None:
    print(f"a sub-network of half of the {table.steps} residual steps, by itself: error {table.member_error:.2%}")
    for ensemble in table.ensembles:
        print(_said(f"{ensemble.size:3d} of them averaged", ensemble.score))


def _said(what: str, score: Any) -> str:
    low, high = score.error_interval
    said = f"error {score.error:.2%} ({low:.2%} to {high:.2%}), loss {score.loss:.4f}"
    return f"{what}: {said} on {score.count} samples" if what else said


SAYS = {
    "single": _say_steps,
    "layer": _say_steps,
    "stage": _say_steps,
    "multiple": _say_draws,
    "permute": _say_draws,
}
