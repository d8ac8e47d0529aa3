"""The gradient by the length of its paths."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from resode.plots.frame import COLOURS, GREY, MARKERS, legend_of, new_figure, tidy, whole_numbers

LEAST = 1e-8
"""Parts smaller than this share of the gradient are not drawn."""
NOTHING = 1e-3
"""Nor the lengths beyond which all shares of the gradients of steps are below this, but for two."""

Found = Mapping[str, Any]
"""What ``resode spectrum`` saves: "exact" (``Spectrum.to_dict``), and perhaps "sampled" and "effective"."""


def spectrum(found: Mapping[str, Found]) -> Figure:
    """How many paths have which length, what their gradients are like, and which lengths carry the gradient.

    Four panels: the distribution of path lengths; the mean norm of a single path's gradient; the gradient of each
    length, as the norm of the exact sum over its paths and as the number of paths times the mean norm of one (Veit et
    al. 2016, figure 6; a bar at the bottom spans the lengths that carry most of the latter), both relative to the norm
    of the gradient; and the exact share of the gradient.

    Args:
        found: by the name of the net.
    """
    figure = new_figure(2, 2, width=4.6, height=3.2)
    panels = figure.subplots(2, 2)
    (count, single), (size, share) = panels
    for i, ((name, one), colour, marker) in enumerate(zip(found.items(), COLOURS, MARKERS, strict=False)):
        exact, sampled, effective = one["exact"], one.get("sampled"), one.get("effective")
        style = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.1}
        total = sum(exact["counts"])
        count.plot([n / total for n in exact["counts"]], **style, label=name)
        relative = [norm / exact["norm"] for norm in exact["norms"]]
        size.plot(relative, **style, label=f"{name}: norm of the sum over paths")
        share.plot(exact["shares"], **style)
        if sampled:
            there = [(k, v) for k, v in enumerate(sampled["norms"]) if v > 0]
            single.plot([k for k, _ in there], [v for _, v in there], **style)
            totals = [(k, v / exact["norm"]) for k, v in enumerate(sampled["totals"]) if v > 0]
            size.plot(
                [k for k, _ in totals],
                [v for _, v in totals],
                **{**style, "linestyle": "--", "fillstyle": "none"},
                label=f"{name}: number × mean norm of a path",
            )
        if effective:
            place, at_bottom = 0.025 + 0.03 * i, size.get_xaxis_transform()
            ends = [effective["first"] - 0.4, effective["last"] + 0.4]
            size.plot(ends, [place, place], color=colour, linewidth=3, solid_capstyle="butt", transform=at_bottom)
    share.axhline(0.0, color=GREY, linewidth=0.8)
    labels = {
        count: "share of all paths",
        single: "mean norm of a path's gradient",
        size: "relative to ‖gradient‖",
        share: "share of the gradient",
    }
    for axes, label in labels.items():
        axes.set_xlabel("length of the path")
        axes.set_ylabel(label)
        whole_numbers(axes.xaxis)
        tidy(axes)
    size.set_yscale("log")
    size.set_ylim(bottom=max(size.get_ylim()[0], LEAST))
    if single.lines:
        single.set_yscale("log")
    count.yaxis.set_major_formatter(PercentFormatter(1.0))
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    if any(one.get("effective") for one in found.values()):
        size.set_xlabel("length of the path (bars: those that carry most)")
    figure.legend(*legend_of([size]), frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    return figure


def spectra_by_step(found: Mapping[str, Any]) -> Figure:
    """Which lengths of paths train which step: the share of each length in the gradient after every step.

    Args:
        found: ``StepSpectra.to_dict``.
    """
    figure = new_figure(width=6.4, height=4.6)
    axes: Axes = figure.subplots()
    rows = found["shares"][1:]
    last = max((k for row in rows for k, share in enumerate(row) if abs(share) > NOTHING), default=0)
    rows = [row[: last + 3] for row in rows]
    image = axes.imshow(rows, aspect="auto", origin="lower", cmap="RdBu_r", norm=CenteredNorm(), interpolation="none")
    stages = found["stages"][:-1]
    for i in range(1, len(stages)):
        if stages[i] != stages[i - 1]:
            axes.axhline(i - 0.5, color="black", linewidth=0.8)
    axes.set_xlabel("length of the path from the step to the output")
    axes.set_ylabel("step (lines: stages)")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    figure.colorbar(image, label="share of the gradient", format=PercentFormatter(1.0, decimals=0))
    return figure
