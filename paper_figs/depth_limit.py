"""Which trained nets are near an ODE, and their controls. Results: ``experiments.depth_limit``."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import nan
from statistics import mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from paper_figs.common import sign
from resode.plots import COLOURS, GREY, MARKERS, new_figure, tidy

SOURCE = "depth_limit"
VERDICTS = {True: ("o", "near an ODE"), False: ("X", "not near an ODE"), None: ("$?$", "cannot be told")}


def figure(published: Mapping[str, Any]) -> Figure:
    """Error and accuracy of the ODE nets on other grids, every seed with its verdict; accuracy beside the controls."""
    found = published["results"]
    nets = [net for name, net in found.items() if name != "matched"]
    flows = sorted((net for net in nets if net["what"] == "flow"), key=lambda net: (net["solver"], net["count"]))
    drawn = new_figure(1, 3, width=4.2, height=3.6)
    errors, accuracies, controls = drawn.subplots(1, 3)
    for net, colour in zip(flows, cycle(COLOURS), strict=False):
        seeds = [each for each in net["seeds"] if each["certificate"]]
        _curves(errors, seeds, "error", colour, _named(net))
        _curves(accuracies, seeds, "accuracy", colour)
    errors.set_yscale("log")
    errors.set_ylabel("relative error of the logits")
    errors.set_title("ODE nets on other grids", fontsize=9, loc="left")
    accuracies.set_title("… and their accuracy", fontsize=9, loc="left")
    _of_nets(controls, nets)
    for axes in (accuracies, controls):
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (errors, accuracies, controls):
        _counts(axes)
        tidy(axes)
    errors.legend(frameon=False, fontsize=7, title="trained with", title_fontsize=7)
    verdicts = [each["certificate"]["near_ode"] for net in flows for each in net["seeds"] if each["certificate"]]
    handles = [
        Line2D([], [], color=GREY, linestyle="", marker=marker, label=label)
        for told, (marker, label) in VERDICTS.items()
        if told in verdicts
    ]
    accuracies.legend(
        handles=handles,
        loc="lower right",
        framealpha=0.8,
        edgecolor="white",
        fontsize=7,
        title="as trained",
        title_fontsize=7,
    )
    controls.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return sign(drawn, published)


def _number(value: float | None) -> float:
    """Infinities are null in JSON: states that refined steps let grow without bound. They are not drawn."""
    return nan if value is None else value


def _named(net: Mapping[str, Any]) -> str:
    return f"{net['solver']}, {net['count']} step{'s' * (net['count'] != 1)}"


def _curves(axes: Axes, seeds: Sequence[Mapping[str, Any]], key: str, colour: str, label: str | None = None) -> None:
    """By evaluations of f, with the trained net's own solver: the seeds' median, and every seed as it was trained."""
    if not seeds:
        return
    curves = [
        {one["nfe"]: _number(one[key]) for one in each["certificate"]["swaps"] if one["solver"] == "as trained"}
        for each in seeds
    ]
    counts = sorted(curves[0])
    for curve in curves:
        axes.plot(counts, [curve[n] for n in counts], color=colour, linewidth=0.5, alpha=0.5)
    middle = [median(curve[n] for curve in curves) for n in counts]
    axes.plot(counts, middle, color=colour, linewidth=1.4, label=label)
    for each, curve in zip(seeds, curves, strict=True):
        marker = VERDICTS[each["certificate"]["near_ode"]][0]
        own = each["evaluations"]
        axes.plot([own], [curve[own]], color=colour, marker=marker, markersize=6, linestyle="", alpha=0.8)


def _of_nets(axes: Axes, nets: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by evaluations: mean and 95% interval over the seeds."""
    axes.set_title("Accuracy beside that of controls", fontsize=9, loc="left")
    solvers = sorted({net["solver"] for net in nets if net["what"] == "flow"})
    kinds = [
        *((f"ODE nets, {solver}", "flow", solver) for solver in solvers),
        ("residual nets, untied", "untied", None),
        ("residual nets, tied", "tied", None),
    ]
    for shift, ((label, what, solver), colour, marker) in enumerate(zip(kinds, COLOURS, MARKERS, strict=False)):
        ones = [net for net in nets if net["what"] == what and solver in (None, net["solver"]) and net["accuracy"]]
        ones.sort(key=lambda net: net["evaluations"])
        # A little to the side: intervals at the same number would hide each other.
        places = [net["evaluations"] * 1.05 ** (shift - 1.5) for net in ones]
        means = [net["accuracy"]["mean"] for net in ones]
        sizes = [net["accuracy"]["high"] - net["accuracy"]["mean"] for net in ones]
        axes.errorbar(
            places, means, sizes, color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=label
        )
        if what == "flow":  # what they would answer as ODEs
            exact = [mean(each["certificate"]["reference"]["accuracy"] for each in net["seeds"]) for net in ones]
            axes.plot(
                places,
                exact,
                color=colour,
                marker=marker,
                mfc="white",
                linestyle=":",
                label=f"their flows, {solver}",
            )
    for net in nets:
        if net["what"] == "nothing" and net["accuracy"]:
            axes.axhline(net["accuracy"]["mean"], color=GREY, linewidth=1.0, linestyle="--", label="no block")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.005))


def _counts(axes: Axes) -> None:
    """Evaluations of f in a forward pass, in powers of 2."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("evaluations of f in a forward pass")
