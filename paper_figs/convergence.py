"""ODE nets evaluated with other solvers and steps than in training. Results: ``experiments.convergence``."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from paper_figs.common import sign
from resode.plots import COLOURS, MARKERS, new_figure, tidy

SOURCE = "convergence"


def figure(published: Mapping[str, Any]) -> Figure:
    """A column for each training; above the error of the logits, below the accuracy; every seed, and their mean."""
    trainings = dict(sorted(published["results"].items(), key=_solver_and_steps))
    drawn = new_figure(2, len(trainings), width=2.7, height=2.4)
    panels = drawn.subplots(2, len(trainings), sharex=True, sharey="row", squeeze=False)
    for column, (name, found) in zip(panels.T, trainings.items(), strict=True):
        solver, steps = name.rsplit("-", 1)
        column[0].set_title(f"trained: {solver}, {steps} step{'s' if steps != '1' else ''}", fontsize=9)
        for axes, key in zip(column, ("logit_error", "accuracy"), strict=True):
            _curves(axes, found["convergence"], key)
            axes.axvline(int(steps), color="#777777", linewidth=1.0, linestyle=":")
            axes.set_xscale("log", base=2)
            ticks = sorted({e["steps"] for e in found["convergence"][0]["evaluations"]})
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            tidy(axes)
        column[1].set_xlabel("steps of the evaluation")
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylabel("relative error of the logits")
    panels[1, 0].set_ylabel("test accuracy")
    panels[1, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0, 0].legend(frameon=False, fontsize=8)
    return sign(drawn, published)


def _solver_and_steps(training: tuple[str, Any]) -> tuple[str, int]:
    """The columns' order: 4 steps come before 16."""
    solver, steps = training[0].rsplit("-", 1)
    return solver, int(steps)


def _curves(axes: Any, tables: list[Mapping[str, Any]], key: str) -> None:
    solvers = list(dict.fromkeys(e["solver"] for e in tables[0]["evaluations"]))
    for solver, colour, marker in zip(solvers, COLOURS, MARKERS, strict=False):
        curves = [{e["steps"]: e[key] for e in table["evaluations"] if e["solver"] == solver} for table in tables]
        steps = sorted(curves[0])
        for curve in curves:
            axes.plot(steps, [curve[n] for n in steps], color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(
            steps,
            [mean(curve[n] for curve in curves) for n in steps],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label=solver,
        )
