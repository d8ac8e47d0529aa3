"""Training and test error of nets that differ in depth."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from resode.plots.frame import COLOURS, new_figure, spans_a_decade, tidy, whole_numbers


def degradation(nets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Training error (dashed) and test error (solid) by epoch: a panel a kind of net, a colour a depth.

    Curves are means over the seeds that did not diverge, bands span them (He et al. 2016, figure 6). The axis of errors
    is logarithmic where they span more than a decade and none is 0.

    Args:
        nets: what ``experiments.degradation`` finds, by the name of the kind.
    """
    figure = new_figure(1, len(nets), width=4.2, height=3.2)
    panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, nets.items(), strict=True):
        for row, colour in zip(found["depths"], cycle(COLOURS), strict=False):
            whole = _whole(row)
            for key, style in (("test_error", "-"), ("train_error", "--")) if whole else ():
                columns = list(zip(*(seed[key] for seed in whole), strict=True))
                epochs = range(1, len(columns) + 1)
                label = f"depth {row['depth']}" if key == "test_error" else None
                axes.plot(epochs, list(map(mean, columns)), color=colour, linestyle=style, linewidth=1.3, label=label)
                low, high = list(map(min, columns)), list(map(max, columns))
                axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("epoch")
        whole_numbers(axes.xaxis)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("error (solid: test; dashed: training)")
    _scale(panels[0], [error for found in nets.values() for row in found["depths"] for error in _errors(row)])
    return figure


def _whole(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trainings that did not diverge."""
    return [seed for seed in row["seeds"] if seed["diverged"] is None]


def _errors(row: Mapping[str, Any]) -> list[float]:
    return [error for seed in _whole(row) for key in ("test_error", "train_error") for error in seed[key]]


def _scale(axes: Axes, errors: Sequence[float]) -> None:
    """The axis of errors that all panels share."""
    if spans_a_decade(errors):
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(errors), 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
