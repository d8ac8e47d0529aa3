"""What every figure does alike: find its results, and say which runs it shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent.parent / "results"
OUT = Path(__file__).parent / "out"


def read(path: Path) -> dict[str, Any]:
    """A published results file."""
    return json.loads(path.read_text())


def provenance(published: Mapping[str, Any]) -> str:
    """Which run a figure shows, in one line."""
    environment = published["environment"]
    revision = (environment["git"] or {}).get("revision", "unknown")[:8]
    device = environment["device"]["name"]
    return (
        f"experiments.{published['experiment']} {published['configuration']}, revision {revision}, {device}, "
        f"torch {environment['versions']['torch']}, {environment['time'][:10]}"
    )


def sign(figure: Figure, published: Mapping[str, Any]) -> Figure:
    """Write the provenance under ``figure``, on several lines where it is wider than the figure."""
    figure.supxlabel(provenance(published), fontsize=6, color="#777777", wrap=True)
    return figure
