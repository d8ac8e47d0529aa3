"""A net at other depths."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from resode.plots.frame import COLOURS, GREY, MARKERS, new_figure, tidy


def convergence(table: Mapping[str, Any], split: str = "test") -> Figure:
    """Error of the logits against the reference solve, and accuracy, by the number of steps in each ODE block.

    Args:
        table: a convergence table (``ConvergenceTable.to_dict``).
        split: the split of the data on which it was measured.
    """
    figure = new_figure(1, 2)
    error, accuracy = figure.subplots(1, 2)
    solvers = list(dict.fromkeys(e["solver"] for e in table["evaluations"]))
    for solver, colour, marker in zip(solvers, COLOURS, MARKERS, strict=False):
        rows = [e for e in table["evaluations"] if e["solver"] == solver]
        steps = [e["steps"] for e in rows]
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": solver}
        error.plot(steps, [e["logit_error"] for e in rows], **style)
        accuracy.plot(steps, [e["accuracy"] for e in rows], **style)
    accuracy.axhline(table["reference_accuracy"], color="black", linewidth=1.0, linestyle="--", label="reference")
    trained = sorted({steps for _, steps in table["trained"] if steps is not None})
    ticks = sorted({e["steps"] for e in table["evaluations"]})
    for axes in (error, accuracy):
        for steps in trained:
            axes.axvline(steps, color=GREY, linewidth=1.0, linestyle=":", label=f"trained with {steps}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(steps) for steps in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("steps in each ODE block")
        tidy(axes)
    error.set_yscale("log")
    error.set_ylabel("relative error of the logits")
    accuracy.set_ylabel(f"{split} accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy.set_ylim(0, 1.02)
    accuracy.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
