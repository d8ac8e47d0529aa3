"""The gradient of nets by the length of its paths. Results: ``experiments.spectrum``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from paper_figs.common import sign
from resode import plots

SOURCE = "spectrum"


def figure(published: Mapping[str, Any]) -> Figure:
    """The first seed's nets: the residual net before and after its training, trained on some blocks a batch; the ODE
    net."""
    found = published["results"]
    nets = {
        "residual net": found["whole"]["trained"],
        "before training": found["whole"]["before"],
        "trained on some blocks": found["sampled"]["trained"],
        "ODE net": found["ode"]["trained"],
    }
    return sign(plots.spectrum(nets), published)
