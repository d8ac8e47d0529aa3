"""Errors of plain and residual nets of several depths in training. Results: ``experiments.degradation``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "degradation"
NAMES = {"plain": "Plain nets", "resnet": "Residual nets"}


def figure(published: Mapping[str, Any]) -> Figure:
    """A panel for each kind of net."""
    found = published["results"]
    return sign(plots.degradation({title: found[name] for name, title in NAMES.items() if name in found}), published)
