"""Error of nets by how far their steps are out of order. Results: ``experiments.lesion``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from paper_figs.lesion import SOURCE as SOURCE
from paper_figs.lesion import chance, tables
from resode import plots


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's nets."""
    return sign(plots.by_order(tables(published, "permute"), chance(published)), published)
