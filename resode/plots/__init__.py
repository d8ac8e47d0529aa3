"""Pictures of results. Every function takes plain values, as results on disk hold them, and returns a figure.

Nothing here knows a model: a figure can be drawn again from a run folder without building one.
"""

from resode.plots.certificate import certificate, regime
from resode.plots.degradation import degradation
from resode.plots.deletions import by_number, by_order, lesions
from resode.plots.depth import convergence
from resode.plots.frame import COLOURS, GREY, MARKERS, Records, new_figure, spans_a_decade, tidy, whole_numbers
from resode.plots.learning import training, trajectories
from resode.plots.path_lengths import spectra_by_step, spectrum
from resode.plots.scaling import growth, trained_by_depth

__all__ = [
    "COLOURS",
    "GREY",
    "MARKERS",
    "Records",
    "by_number",
    "by_order",
    "certificate",
    "convergence",
    "degradation",
    "growth",
    "lesions",
    "new_figure",
    "regime",
    "spans_a_decade",
    "spectra_by_step",
    "spectrum",
    "tidy",
    "trained_by_depth",
    "training",
    "trajectories",
    "whole_numbers",
]
