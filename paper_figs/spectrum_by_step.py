"""Which lengths of paths train which step of a residual net. Results: ``experiments.spectrum``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from paper_figs.spectrum import SOURCE as SOURCE
from resode import plots


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's residual net."""
    return sign(plots.spectra_by_step(published["results"]["whole"]["by_step"]), published)
