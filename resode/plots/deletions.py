"""Nets without some of their steps, or with their steps in another order."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from resode.intervals import half_width
from resode.plots.frame import COLOURS, GREY, MARKERS, legend_of, new_figure, shade_stages, tidy, whole_numbers

Tables = Mapping[str, Mapping[str, Any]]
"""Lesion tables (``LesionTable.to_dict``) by the name of the net."""


PLACES = {
    "single": "index of the deleted step (shading: stages)",
    "layer": "index of the deleted layer (shading: stages)",
    "stage": "deleted stage",
}
"""What stands below the bars, by the analysis; names, for any other."""


def lesions(tables: Tables, chance: float | None = None, split: str = "test") -> Figure:
    """Error of each net without one of its steps (or stages), by the step deleted; stages are shaded in turn.

    Args:
        tables: of ``lesion.single``, ``lesion.layer``, ``lesion.stage`` or ``lesion.interventions``, all of one.
        chance: the error of guessing, drawn as a line.
        split: the split of the data on which they were measured.
    """
    figure = new_figure(len(tables), 1, width=7.5, height=2.3)
    panels = figure.subplots(len(tables), 1, sharey=True, squeeze=False)[:, 0]
    for (name, table), axes, colour in zip(tables.items(), panels, cycle(COLOURS), strict=False):
        found = table["lesions"]
        _shade(axes, [lesion["stage"] for lesion in found])
        made = [(i, lesion["score"]) for i, lesion in enumerate(found) if lesion["score"] is not None]
        axes.bar([i for i, _ in made], [score["error"] for _, score in made], color=colour, width=0.8)
        _level(axes, table, chance)
        impossible = [i for i, lesion in enumerate(found) if lesion["score"] is None]
        axes.plot(impossible, [0.03] * len(impossible), "x", color=GREY, label="not deletable" if impossible else None)
        axes.set_title(_title(name, table["baseline"], split), fontsize=9, loc="left")
        axes.set_xlim(-0.7, len(found) - 0.3)
        _errors(axes)
        _places(axes, table.get("analysis", "single"), found)
        tidy(axes)
    panels[-1].set_xlabel(PLACES.get(next(iter(tables.values())).get("analysis", "single"), ""))
    figure.legend(*legend_of(panels), frameon=False, fontsize=8, ncols=4, loc="outside upper right")
    return figure


def by_number(tables: Tables, chance: float | None = None) -> Figure:
    """Error by the number of steps deleted: each random draw, and their mean with its 95% interval over the draws.

    Args:
        tables: of ``lesion.multiple``.
        chance: the error of guessing, drawn as a line.
    """
    figure = new_figure(width=5.6, height=4.0)
    axes = figure.subplots()
    for (name, table), colour, marker in zip(tables.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        groups = {0: [table["baseline"]["error"]], **_by_number(table)}
        axes.plot(
            [k for k, errors in groups.items() for _ in errors],
            [error for errors in groups.values() for error in errors],
            ".",
            color=colour,
            markersize=3,
            alpha=0.35,
        )
        middle = {k: mean(errors) for k, errors in groups.items()}
        half = {k: half_width(errors) if len(errors) > 1 else 0.0 for k, errors in groups.items()}
        axes.plot(list(middle), list(middle.values()), color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(
            list(middle),
            [max(0.0, middle[k] - half[k]) for k in middle],
            [min(1.0, middle[k] + half[k]) for k in middle],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    _chance_line(axes, chance)
    _errors(axes)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("number of steps deleted")
    tidy(axes)
    figure.legend(*legend_of([axes]), frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    return figure


def by_order(tables: Tables, chance: float | None = None) -> Figure:
    """Error by Kendall's τ between the order of the steps and the one of the training: a point for each draw.

    Args:
        tables: of ``lesion.permute``.
        chance: the error of guessing, drawn as a line.
    """
    figure = new_figure(width=5.6, height=4.0)
    axes = figure.subplots()
    for (name, table), colour, marker in zip(tables.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        made = [lesion for lesion in table["lesions"] if lesion["score"] is not None]
        axes.plot(
            [1.0, *(lesion["tau"] for lesion in made)],
            [table["baseline"]["error"], *(lesion["score"]["error"] for lesion in made)],
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=3.5,
            alpha=0.6,
            label=name,
        )
    _chance_line(axes, chance)
    _errors(axes)
    axes.invert_xaxis()
    axes.set_xlabel("Kendall's τ of the order of steps (1: as trained)")
    tidy(axes)
    figure.legend(*legend_of([axes]), frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    return figure


def _shade(axes: Axes, stages: Sequence[int | None]) -> None:
    if None not in stages:
        shade_stages(axes, stages)


def _places(axes: Axes, analysis: str, found: Sequence[Mapping[str, Any]]) -> None:
    """Ticks below the bars: indices, stages, or the names of what was done."""
    if analysis == "stage":
        axes.set_xticks(range(len(found)), [str(lesion["stage"]) for lesion in found])
    elif analysis in PLACES:
        whole_numbers(axes.xaxis)
    else:
        names = [lesion["label"] for lesion in found]
        axes.set_xticks(range(len(found)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)


def _title(name: str, baseline: Mapping[str, Any], split: str) -> str:
    return f"{name} (error {baseline['error']:.1%} on {baseline['count']} {split} samples)".replace("  ", " ").strip()


def _by_number(table: Mapping[str, Any]) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = {}
    for lesion in table["lesions"]:
        if lesion["score"] is not None:
            groups.setdefault(lesion["number"], []).append(lesion["score"]["error"])
    return dict(sorted(groups.items()))


def _level(axes: Axes, table: Mapping[str, Any], chance: float | None) -> None:
    axes.axhline(table["baseline"]["error"], color="black", linewidth=1.0, linestyle="--", label="none deleted")
    _chance_line(axes, chance)


def _chance_line(axes: Axes, chance: float | None) -> None:
    if chance is not None:
        axes.axhline(chance, color=GREY, linewidth=1.0, linestyle=":", label="guessing")


def _errors(axes: Axes) -> None:
    axes.set_ylim(0, 1.0)
    axes.set_ylabel("error")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
