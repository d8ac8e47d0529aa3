"""Error of a residual, a plain and an ODE net without one of their steps. Results: ``experiments.lesion``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "lesion"
NAMES = {"residual": "Residual net", "plain": "Plain net", "ode": "ODE net"}


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's deletions, one panel a net."""
    found = published["results"]
    tables = {title: found[name]["lesions"][0] for name, title in NAMES.items()}
    return sign(plots.lesions(tables, chance=1 - 1 / found["residual"]["classes"]), published)
