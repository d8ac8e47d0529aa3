"""What becomes of residual stages as their depth grows, at initialization and in training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from resode.plots.frame import COLOURS, GREY, MARKERS, new_figure, tidy

LARGEST, SMALLEST = 1e4, 1e-3
"""Of the axes: an explosion leaves them."""
PERCENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WEIGHTS = {"iid": "independent weights", "smooth": "smooth in depth", "tied": "the same in all blocks"}


def growth(tables: Sequence[Mapping[str, Any]]) -> Figure:
    """How far stages take states (solid) and gradients (dashed), by depth: a row a norm, a column a kind of weights.

    Curves are geometric means over the seeds, bands span them. Each panel says the exponents of the states, with their
    95% intervals; of what grows faster than any power, that it does.

    Args:
        tables: scaling tables (``ScalingTable.to_dict``); SkipInit's, which changes nothing, is left out.
    """
    drawn = [table for table in tables if not isinstance(table["stage"]["beta"], str)]
    norms, weights, betas = (_in_order(drawn, key) for key in ("norm", "weights", "beta"))
    figure = new_figure(len(norms), len(weights), width=2.9, height=2.3)
    panels = figure.subplots(len(norms), len(weights), sharex=True, sharey=True, squeeze=False)
    for table in drawn:
        stage = table["stage"]
        axes = panels[norms.index(stage["norm"])][weights.index(stage["weights"])]
        colour = COLOURS[betas.index(stage["beta"]) % len(COLOURS)]
        marker = MARKERS[betas.index(stage["beta"]) % len(MARKERS)]
        label = f"$\\beta$ = {stage['beta']:g}: {_exponent(table)}"
        _band(axes, table["growths"], "change", color=colour, marker=marker, label=label)
        _band(axes, table["growths"], "gradient_change", color=colour, linestyle="--")
    for row, norm in zip(panels, norms, strict=True):
        row[0].set_ylabel(f"{'no' if norm == 'none' else norm} norm\nrelative change")
    for axes, name in zip(panels[0], weights, strict=True):
        axes.set_title(WEIGHTS.get(name, name), fontsize=9)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(SMALLEST, LARGEST)
        tidy(axes)
        axes.legend(frameon=False, fontsize=6.5, loc="lower left", handlelength=1.2, labelspacing=0.2)
    for axes in panels[-1]:
        axes.set_xlabel("depth $L$ ($p$: power of $L$, states)", fontsize=8)
    keys = [
        Line2D([], [], color=GREY, linestyle=style, label=label)
        for style, label in (
            ("-", "states: $\\|h_L - h_0\\|/\\|h_0\\|$"),
            ("--", "gradients: $\\|g_0 - g_L\\|/\\|g_L\\|$"),
        )
    ]
    figure.legend(handles=keys, frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    return figure


def trained_by_depth(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Nets trained at several depths: error, how states and weights go from block to block, and what was learnt.

    A row an optimizer, a colour a case; every seed, and their mean where none diverged at that depth. A cross at the
    top marks a depth at which some seed diverged. Each panel says the exponents with their 95% intervals; dotted lines
    have the slopes of theory.

    Args:
        cases: what ``experiments.scaling_trained`` finds, a case each.
    """
    optimizers = list(dict.fromkeys(case["optimizer"] for case in cases))
    names = sorted({_case_name(case) for case in cases})
    depths = sorted({t["blocks"] for case in cases for t in case["trainings"]})
    figure = new_figure(len(optimizers), len(LOOKS), width=2.7, height=2.7)
    panels = figure.subplots(len(optimizers), len(LOOKS), sharex=True, sharey="col", squeeze=False)
    for case in sorted(cases, key=_case_name):
        row, index = panels[optimizers.index(case["optimizer"])], names.index(_case_name(case))
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for axes, look in zip(row, LOOKS, strict=True):
            _seeds(axes, case["trainings"], look.of, _power(look.exponent(case)), 0.97 - 0.05 * index, style)
    for row, optimizer in zip(panels, optimizers, strict=True):
        for axes, look in zip(row, LOOKS, strict=True):
            axes.set_ylabel(look.label, fontsize=8)
            axes.set_title(optimizer, fontsize=9, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_xticks(depths, [str(depth) for depth in depths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale(look.scale)
            axes.yaxis.set_minor_formatter(NullFormatter())
            tidy(axes)
            _slopes(axes, depths, look.slopes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, fontsize=6, loc="lower left", handlelength=1.0, labelspacing=0.2)
        row[0].set_yticks(PERCENTS)
        row[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        row[3].set_ylim(0.0, None)
    for axes in panels[-1]:
        axes.set_xlabel("blocks $L$ ($p$: power of $L$)", fontsize=8)
    keys = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=3.5, label=name)
        for i, name in enumerate(names)
    ]
    if any(t["diverged"] is not None for case in cases for t in case["trainings"]):
        keys.append(Line2D([], [], color=GREY, linestyle="", marker="x", markersize=4, label="some seed diverged"))
    figure.legend(handles=keys, frameon=False, fontsize=8, ncols=len(keys), loc="outside upper center")
    return figure


@dataclass(frozen=True)
class Look:
    """What a panel shows of each training, the exponent of it in a case, and the slopes that theory has for it."""

    label: str
    of: Callable[[Mapping[str, Any]], float]
    exponent: Callable[[Mapping[str, Any]], Mapping[str, float] | None] = lambda case: None
    slopes: tuple[float, ...] = ()
    scale: str = "log"


def _fitted(quantity: str) -> Callable[[Mapping[str, Any]], Mapping[str, float] | None]:
    def of(case: Mapping[str, Any]) -> Mapping[str, float] | None:
        fits = case["after"]["fits"] if case["after"] else ()
        return next((fit for fit in fits if fit["quantity"] == quantity), None)

    return of


LOOKS = (
    Look("test error", lambda t: 1 - t["scores"]["test"]["accuracy"]),
    Look(
        "increment of the state\n" r"$\|h_{l+1} - h_l\|/\|h_l\|$",
        lambda t: t["after"]["relative_increment"],
        _fitted("relative_increment"),
        (-0.5, -1.0),
    ),
    Look(
        "roughness of the weights\n" r"$\|W_{l+1} - W_l\|/\|W_l\|$",
        lambda t: t["after"]["roughness"],
        _fitted("roughness"),
        (0.0, -1.0),
    ),
    Look(
        "coherence of the update\n" r"$\|\Sigma\,\Delta W_l\|/\Sigma\,\|\Delta W_l\|$",
        lambda t: t["update"]["coherence"],
        lambda case: case["update"] and case["update"]["coherence"],
        scale="linear",
    ),
)


def _in_order(tables: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of a setting: no norm, and independent weights, come first."""
    return sorted({t["stage"][key] for t in tables}, key=lambda value: (value not in ("none", "iid"), value))


def _exponent(table: Mapping[str, Any]) -> str:
    """p of the states; of an explosion whose local exponents grow, the word for it."""
    found = table["exponents"]["change"]
    if table["verdict"] == "explosion" and (found is None or found["local"][-1] > 1.5 * found["mean"]):
        return "faster than any power"
    return _power(found) or "no power"


def _power(found: Mapping[str, float] | None) -> str | None:
    """p with half of its interval."""
    return found and f"p = {_number(found['mean'])} ± {found['high'] - found['mean']:.2f}"


def _number(value: float) -> str:
    """Two decimals, with a minus sign, and none before 0."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _band(axes: Axes, growths: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """Geometric mean and span over the seeds of one quantity, by depth; what is 0 or infinite is left out."""
    by_depth: dict[int, list[float]] = {}
    for growth in growths:
        value = growth[key]
        if value is not None and value > 0 and isfinite(value):
            by_depth.setdefault(growth["depth"], []).append(value)
    depths = sorted(by_depth)
    middle = [exp(mean(map(log, by_depth[depth]))) for depth in depths]
    axes.plot(depths, middle, markersize=3, linewidth=1.2, **style)
    low, high = ([pick(by_depth[depth]) for depth in depths] for pick in (min, max))
    axes.fill_between(depths, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _case_name(case: Mapping[str, Any]) -> str:
    if case["beta"] == "skipinit":
        return "SkipInit"
    return f"$\\beta$ = {float(case['beta']):g}, {case['weights']}"


def _seeds(
    axes: Axes,
    trainings: Sequence[Mapping[str, Any]],
    look: Callable[[Mapping[str, Any]], float],
    label: str | None,
    place: float,
    style: Mapping[str, Any],
) -> None:
    """Every seed, their mean where none diverged, and a cross at the height ``place`` where one did."""
    found: dict[int, list[float]] = {}
    diverged = {t["blocks"] for t in trainings if t["diverged"] is not None}
    for t in trainings:
        if t["diverged"] is None and look(t):
            found.setdefault(t["blocks"], []).append(look(t))
    points = [(depth, value) for depth, values in found.items() for value in values]
    if points:
        axes.plot(*zip(*points, strict=True), ".", color=style["color"], markersize=2.5)
    whole = [depth for depth in sorted(found) if depth not in diverged]
    axes.plot(whole, [mean(found[d]) for d in whole], **style, markersize=3.5, linewidth=1.2, label=label)
    by_height = axes.get_xaxis_transform()
    axes.plot(sorted(diverged), [place] * len(diverged), "x", color=style["color"], markersize=4, transform=by_height)


def _slopes(axes: Axes, depths: Sequence[int], exponents: Sequence[float]) -> None:
    """Dotted lines of these slopes, from the top of what is drawn."""
    drawn = [y for line in axes.lines if line.get_marker() == "." for y in line.get_ydata()]
    for p in exponents if drawn else ():
        line = [max(drawn) * (depth / depths[0]) ** p for depth in depths]
        axes.plot(depths, line, ":", color=GREY, linewidth=1.0)
        # Beyond the end of the line: above or below it, this or another line would strike the words through.
        place = {"xytext": (5, 0), "textcoords": "offset points", "ha": "left", "va": "center"}
        axes.annotate(f"$L^{{{p:g}}}$", (depths[-1], line[-1]), fontsize=7, color=GREY, **place)
