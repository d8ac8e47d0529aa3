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
    tables = {NAMES[name]: found["lesions"][0] for name, found in _nets(published).items()}
    return sign(plots.lesions(tables, chance=0.9), published)


def _nets(published: Mapping[str, Any]) -> dict[str, Any]:
    return {name: published["results"][name] for name in NAMES}
