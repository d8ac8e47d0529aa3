"""``resode demo`` and ``resode train``."""

import re
from dataclasses import dataclass
from pathlib import Path

from resode import demo
from resode.cli.common import SetupFlags, said_of
from resode.runs import digest
from resode.train import fidelity
from resode.train.session import Setup, train


@dataclass(frozen=True)
class Demo:
    """Train a residual net, a plain net and an ODE net on digits, analyse them, and write a report (3 minutes).

    Args:
        out: folder of the run; the same folder again shows what was found.
        device: cpu, cuda, cuda:1.
    """

    out: Path = Path("runs/demo")
    device: str = "cpu"

    def run(self) -> None:
        known = (self.out / "DONE").exists()
        paths = demo.demo(demo.Demo(), self.out, device=self.device)
        if known:
            print(f"This demo was run before; remove {self.out} to run it again.")
        print("Report: ", paths[0])
        for path in paths[1:]:
            print("Figure: ", path)


@dataclass(frozen=True)
class Train(SetupFlags):
    """Train a net, and keep everything in a run folder. The same command again resumes an interrupted training.

    Example: resode train --net resnet --depth 20 --data cifar10 --data-dir data --device cuda

    Args:
        out: folder of the run; by default one under runs/ named after the settings.
    """

    out: Path | None = None

    def run(self) -> None:
        out = self.out or Path("runs") / default_name(self.setup)
        run = train(self.setup, out, device=self.device, progress=True)
        result = run.result("train")
        for split in ("train", "validation", "test"):
            if split in result:
                print(f"{split:10s} {said_of(result[split])}")
        print(f"{result['parameters']:,} parameters, NFE {result['nfe']}, {result['seconds']:.1f} s of training")
        measured = result.get("gradient_fidelity", {})
        if said := fidelity.warning(measured.get("end", {}), "the trained net"):
            print("Warning:", said)
        print("Run:", run.path)


def default_name(setup: Setup) -> str:
    """A folder's name for a training, told apart from that of any other settings by a hash."""
    data = re.sub(r"[^a-z0-9]+", "-", setup.data.data.lower()).strip("-")[-30:]
    return f"{data}-{setup.architecture.net}-seed-{setup.recipe.seed}-{digest(setup)}"
