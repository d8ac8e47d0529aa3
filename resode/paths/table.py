"""What lesions found: a typed table, as JSON, CSV or a picture."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from resode import plots
from resode.paths.scores import Score
from resode.runs import jsonable, write_atomic


@dataclass(frozen=True)
class Lesion:
    """One changed network.

    Args:
        label: the step or stage deleted, or what was done.
        steps: places at which the network was changed.
        order: which steps stand there, if they are out of order.
        kind, stage, t: of the step, where it is one.
        number: how many steps were deleted, or pairs swapped.
        draw: which of the random draws of that number.
        tau: Kendall's rank correlation of the order of steps with the one of the training.
        score: None where the change cannot be made: a transition, or a plain layer that changes the shape.
    """

    label: str
    steps: tuple[int, ...]
    kind: str | None = None
    stage: int | None = None
    t: float | None = None
    number: int | None = None
    draw: int | None = None
    tau: float | None = None
    order: tuple[int, ...] | None = None
    score: Score | None = None


@dataclass(frozen=True)
class LesionTable:
    """The network as it is (``baseline``), and changed.

    Args:
        analysis: "single", "multiple", "permute", "stage", "layer" or "interventions".
    """

    analysis: str
    baseline: Score
    lesions: tuple[Lesion, ...]

    @property
    def made(self) -> tuple[Lesion, ...]:
        """The lesions that could be made."""
        return tuple(lesion for lesion in self.lesions if lesion.score is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LesionTable":
        """The inverse of :meth:`to_dict`, lists for tuples as JSON has them."""
        return cls(
            values["analysis"],
            Score.from_dict(values["baseline"]),
            tuple(
                Lesion(
                    **{
                        **lesion,
                        "steps": tuple(lesion["steps"]),
                        "order": None if lesion.get("order") is None else tuple(lesion["order"]),
                        "score": None if lesion["score"] is None else Score.from_dict(lesion["score"]),
                    }
                )
                for lesion in values["lesions"]
            ),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to ``path``, if one is given. A loss that is not finite becomes null."""
        return _written(json.dumps(jsonable(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)

    @classmethod
    def from_json(cls, text: str) -> "LesionTable":
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    def to_csv(self, path: str | Path | None = None) -> str:
        """As CSV, a row for each lesion after one for the baseline; written to ``path``, if one is given."""
        out = io.StringIO()
        rows = [_row(Lesion("baseline", (), number=0, tau=1.0, score=self.baseline)), *map(_row, self.lesions)]
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _written(out.getvalue(), path)

    def plot(self, name: str = "", chance: float | None = None, split: str = "") -> Figure:
        """Its picture: error by step (or stage) deleted or change made, by number of steps deleted, or by Kendall's τ.

        Args:
            name: of the network.
            chance: the error of guessing, drawn as a line.
            split: of the data on which it was measured, for the title.
        """
        tables = {name: self.to_dict()}
        if self.analysis in ("multiple", "permute"):
            return {"multiple": plots.by_number, "permute": plots.by_order}[self.analysis](tables, chance)
        return plots.lesions(tables, chance, split)


def _row(lesion: Lesion) -> dict[str, Any]:
    score = lesion.score
    row: dict[str, Any] = {name: value for name, value in vars(lesion).items() if name != "score"}
    row["steps"], row["order"] = (" ".join(map(str, places or ())) for places in (lesion.steps, lesion.order))
    row |= dict.fromkeys(("count", "error", "error_low", "error_high", "loss", "loss_low", "loss_high", "by_class"))
    if score is not None:
        row |= {"count": score.count, "error": score.error, "loss": score.loss}
        row["error_low"], row["error_high"] = score.error_interval
        row["loss_low"], row["loss_high"] = score.loss_interval
        if score.by_class is not None:
            row["by_class"] = " ".join("" if error is None else f"{error:.6g}" for error in score.by_class)
    return row


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_atomic(path, text)
    return text
