"""Error of nets without one of their steps. Results: ``experiments.lesion``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "lesion"
NAMES = {
    "residual": "Residual net",
    "plain": "Plain net",
    "residual-without-norm": "Residual net without norm (SkipInit)",
    "plain-without-norm": "Plain net without norm",
    "vgg": "VGG",
    "ode": "ODE net",
}


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's deletions, one panel a net."""
    return sign(plots.lesions(tables(published, "single"), chance(published)), published)


def tables(published: Mapping[str, Any], analysis: str) -> dict[str, Any]:
    """The first seed's tables of one analysis, by the title of the net."""
    found = published["results"]
    return {title: found[name]["seeds"][0][analysis] for name, title in NAMES.items() if name in found}


def chance(published: Mapping[str, Any]) -> float:
    """The error of guessing."""
    return 1 - 1 / next(iter(published["results"].values()))["classes"]
