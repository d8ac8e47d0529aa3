"""Error of nets by the number of steps deleted at random. Results: ``experiments.lesion``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from paper_figs.lesion import SOURCE as SOURCE
from paper_figs.lesion import chance, tables
from resode import plots


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's nets."""
    return sign(plots.by_number(tables(published, "multiple"), chance(published)), published)
