"""How far residual stages take states and gradients, by depth. Results: ``experiments.scaling_at_init``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "scaling_at_init"


def figure(published: Mapping[str, Any]) -> Figure:
    """A panel for each norm and kind of weights."""
    return sign(plots.growth(list(published["results"].values())), published)
