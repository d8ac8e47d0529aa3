"""``resode check``."""

from dataclasses import dataclass
from pathlib import Path

from resode.cli.common import SetupFlags
from resode.cli.train import default_name
from resode.plots.check import check as picture_of
from resode.report import png
from resode.runs import jsonable, write_atomic
from resode.runs.values import dump
from resode.train.check import check
from resode.train.findings import Finding


@dataclass(frozen=True)
class Check(SetupFlags):
    """Look for what would spoil a long training, in a minute: the settings are those of resode train.

    Asks whether the inputs are standardized, the loss begins at log(classes), every parameter gets a gradient, samples
    of a batch are kept apart, one batch can be overfitted, and the net learns more from the inputs than from zeros.
    Draws a batch as the net sees it, the outputs of its layers and its gradients. The exit status is 1 if anything
    fails.

    Args:
        out: folder for check.json and check.png; by default one under runs/ named after the settings.
    """

    out: Path | None = None

    def run(self) -> None:
        out = self.out or Path("runs") / f"check-{default_name(self.setup)}"
        report = check(self.setup, self.device, tell=_tell)
        found = jsonable({"setup": self.setup, **report.to_dict()})
        write_atomic(out / "check.json", dump(found))
        write_atomic(out / "check.png", png(picture_of(found["picture"])))
        print("Report:", out / "check.json")
        print("Figure:", out / "check.png")
        if not report.passed:
            raise SystemExit(1)


def _tell(finding: Finding) -> None:
    print(f"{'pass' if finding.passed else 'FAIL'}  {finding.name}: {finding.said}", flush=True)
