"""The flow by which an ODE net tells two classes of points apart. Results: ``experiments.trajectories``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "trajectories"


def figure(published: Mapping[str, Any]) -> Figure:
    """A line for each test point, from its place (hollow) to its end (filled)."""
    found = published["results"]["trajectories"]
    return sign(plots.trajectories(found["paths"], found["labels"]), published)
