"""Nets of one residual stage trained at several depths. Results: ``experiments.scaling_trained``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "scaling_trained"


def figure(published: Mapping[str, Any]) -> Figure:
    """A row for each optimizer."""
    return sign(plots.trained_by_depth(list(published["results"].values())), published)
