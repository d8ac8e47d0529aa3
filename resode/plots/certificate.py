"""Is a net near an ODE? The parts of a certificate, and what becomes of nets as their depth grows."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from resode.plots.frame import COLOURS, GREY, MARKERS, new_figure, shade_stages, tidy, whole_numbers

Found = Mapping[str, Any]

SMALL = 7.5


def certificate(found: Found, title: str = "") -> Figure:
    """Eight panels: solver swaps (error, accuracy), reconstruction, distance; regularity, bias, signal, exponents.

    Args:
        found: ``Certificate.to_dict``.
        title: what stands above, before the verdict.
    """
    figure = new_figure(2, 4, width=3.7, height=3.0)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    (error, accuracy, back, rough), (away, bias, signal, rates) = figure.subplots(2, 4)
    missing = dict(found["missing"])
    verdict = found["verdict"]
    for axes, part, draw in (
        (error, "swap", lambda axes, swap: _error(axes, swap, verdict["far"])),
        (accuracy, "swap", _accuracy),
        (back, "reconstruction", _reconstruction),
        (away, "distance", _distance),
    ):
        if found[part] is None:
            _absent(axes, missing.get(part, "not looked at"))
        else:
            draw(axes, found[part])
            tidy(axes)
    _regularity(rough, found["regularity"])
    _bias(bias, found["bias"], found["initial_bias"])
    _signal(signal, found["signal"])
    _lyapunov(rates, found["lyapunov"])
    for axes in (rough, bias, signal, rates):
        tidy(axes)
    names = (
        "1  solver swaps: logits",
        "1  solver swaps: accuracy",
        "2  there and back again",
        "3  regularity in depth",
        "4  distance from the ODE",
        "5  share of the branch",
        "6  signal and gradient",
        "6  Lyapunov exponents",
    )
    for axes, name in zip(figure.axes, names, strict=False):
        axes.set_title(name, fontsize=9, loc="left")
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    said = "\n".join(textwrap.wrap(f"{title}: {verdict['words']}" if title else verdict["words"], 170))
    figure.suptitle(said, fontsize=9, x=0.01, ha="left")
    return figure


def _error(axes: Axes, swap: Found, far: float) -> None:
    solved = [*swap["evaluations"], swap["reference"]]
    for solver, colour, marker in _solvers(solved):
        rows = sorted((e["factor"], e["error"]) for e in solved if e["solver"] == solver)
        axes.plot(*_columns(rows), color=colour, marker=marker, markersize=4, linewidth=1.2, label=solver)
    axes.axhline(far, color=GREY, linewidth=0.9, linestyle="--", label="far")
    axes.axhline(swap["rounding"], color=GREY, linewidth=0.9, linestyle=":", label="rounding")
    _factors(axes, [e["factor"] for e in solved])
    axes.set_yscale("log")
    axes.set_ylabel("relative error of the logits")
    axes.legend(frameon=False, fontsize=SMALL)


def _accuracy(axes: Axes, swap: Found) -> None:
    solved = [*swap["evaluations"], swap["reference"]]
    for solver, colour, marker in _solvers(solved):
        rows = sorted((e["factor"], e["accuracy"]) for e in solved if e["solver"] == solver)
        axes.plot(*zip(*rows, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2)
    axes.axhline(swap["reference"]["accuracy"], color="black", linewidth=0.9, linestyle="--", label="reference")
    if swap["critical"] is not None:
        axes.axvline(swap["critical"], color=GREY, linewidth=0.9, linestyle=":", label="fewer lose accuracy")
    _factors(axes, [e["factor"] for e in solved])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=SMALL, loc="lower right")


def _reconstruction(axes: Axes, found: Found) -> None:
    for block, colour, marker in zip(found["blocks"], cycle(COLOURS), cycle(MARKERS), strict=False):
        rows = list(zip(found["factors"], block["errors"], strict=True))
        axes.plot(*_columns(rows), color=colour, marker=marker, markersize=4, linewidth=1.2, label=block["name"])
        axes.axhline(block["rounding"], color=colour, linewidth=0.9, linestyle=":")
    _factors(axes, found["factors"])
    axes.set_yscale("log")
    axes.set_ylabel("error of the input (dotted: rounding)")
    axes.legend(frameon=False, fontsize=SMALL)


def _distance(axes: Axes, found: Found) -> None:
    for block, colour, marker in zip(found["blocks"], cycle(COLOURS), cycle(MARKERS), strict=False):
        rows = list(zip(block["times"], block["relative"], strict=True))
        axes.plot(*_columns(rows), color=colour, marker=marker, markersize=3, linewidth=1.2, label=block["name"])
        bounds = block["bound"] or ()
        bound = [(t, b and h and b / h) for t, b, h in zip(block["times"], bounds, block["states"], strict=False)]
        axes.plot(*_columns(bound), color=colour, linewidth=0.9, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("time $t$")
    axes.set_ylabel("relative distance (dashed: bound)")
    axes.legend(frameon=False, fontsize=SMALL)


def _regularity(axes: Axes, found: Found) -> None:
    place, stages = 0, []
    for stretch in found["stretches"]:
        depth = stretch["depth"]
        steps = range(place, place + depth)
        increments = [i / h if h else 0.0 for i, h in zip(stretch["increments"], stretch["states"], strict=False)]
        first = place == 0
        style = {"markersize": 3, "linewidth": 1.1}
        label = "‖Δh‖/‖h‖" if first else None
        axes.plot(steps, increments, color=COLOURS[0], marker=MARKERS[0], label=label, **style)
        if stretch["differences"] and any(stretch["differences"]):
            rough = [d / w for d, w in zip(stretch["differences"], stretch["weights"], strict=False)]
            label = "‖ΔW‖/‖W‖" if first else None
            axes.plot([s + 0.5 for s in steps[:-1]], rough, color=COLOURS[1], marker=MARKERS[1], label=label, **style)
        stages += [stretch["stage"]] * depth
        place += depth
    shade_stages(axes, stages)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (shading: stages)")
    axes.set_ylabel("change from step to step")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize=SMALL)


def _bias(axes: Axes, trained: Found, initial: Found | None) -> None:
    for bias, name, colour, marker in (
        (trained, "as it is", COLOURS[0], "o"),
        (initial, "before training", COLOURS[1], "s"),
    ):
        if bias is None:
            continue
        for residual, fill in ((True, "full"), (False, "none")):
            rows = [(i, s) for i, s in enumerate(bias["steps"]) if (s["position"] > 0) is residual]
            shares = [(i, s["branch"] / (s["branch"] + s["shortcut"])) for i, s in rows if s["branch"] + s["shortcut"]]
            axes.plot(
                [i for i, _ in shares],
                [share for _, share in shares],
                color=colour,
                marker=marker,
                markersize=4,
                fillstyle=fill,
                linestyle="none",
                label=name if residual else None,
            )
    shade_stages(axes, [s["stage"] for s in trained["steps"]])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("residual step (hollow: changes the shape)")
    axes.set_ylabel("branch's share of the variance")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize=SMALL)


def _signal(axes: Axes, found: Found) -> None:
    for key, label, colour, marker in (
        ("states", "‖h‖", COLOURS[0], MARKERS[0]),
        ("gradients", "‖∂loss/∂h‖", COLOURS[1], MARKERS[1]),
    ):
        top = max(found[key]) or 1.0
        rows = [(i, v / top) for i, v in enumerate(found[key])]
        axes.plot(*_columns(rows), color=colour, marker=marker, markersize=3, linewidth=1.1, label=f"{label}/max")
    ratios = [(s["index"] + 0.5, s["branch"] / s["shortcut"]) for s in found["steps"] if s["shortcut"] and s["branch"]]
    axes.plot(
        *_columns(ratios),
        color=COLOURS[2],
        marker=MARKERS[2],
        markersize=4,
        linestyle="none",
        label="gradient by branch/by shortcut",
    )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    axes.set_xlabel("state")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize=SMALL)


def _lyapunov(axes: Axes, found: Found) -> None:
    for place, (stretch, colour) in enumerate(zip(found["stretches"], cycle(COLOURS), strict=False)):
        count = len(stretch["exponents"])
        xs = [place + 0.6 * ((i + 0.5) / count - 0.5) for i in range(count)]
        axes.errorbar(xs, stretch["exponents"], stretch["deviations"], color=colour, fmt="o", markersize=4, capsize=2)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    places = range(len(found["stretches"]))
    axes.set_xticks(list(places), [f"{s['depth']} step{'s' * (s['depth'] != 1)}" for s in found["stretches"]])
    axes.set_xlabel("stages")
    axes.set_ylabel("growth rate (bars: deviation)")


def _absent(axes: Axes, why: str) -> None:
    axes.axis("off")
    axes.text(0.0, 0.95, "\n".join(textwrap.wrap(why, 38)), fontsize=SMALL, va="top", transform=axes.transAxes)


def _solvers(solved: Sequence[Found]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys(e["solver"] for e in solved)
    return [(name, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)]


def _factors(axes: Axes, factors: Sequence[float]) -> None:
    ticks = sorted(set(factors))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{factor:g}" if factor >= 1 else f"1/{1 / factor:g}" for factor in ticks])
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("steps, relative to those used")


def _columns(rows: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """The abscissas and ordinates that a logarithmic axis can show."""
    there = [(x, y) for x, y in rows if y is not None and 0.0 < y < math.inf]
    return [x for x, _ in there], [y for _, y in there]


def regime(found: Found, quantities: Sequence[str] = ("relative_increment", "roughness")) -> Figure:
    """Quantities against the depth, a panel for each stage: the values of every seed, and the lines of their exponents.

    Args:
        found: ``Regime.to_dict``.
        quantities: which to draw, of those that were fitted.
    """
    stages = found["stretches"]
    figure = new_figure(1, len(stages), width=4.2, height=3.4)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        depths = stage["depths"]
        fits = [fit for fit in stage["fits"] if fit["quantity"] in quantities]
        for fit, colour, marker in zip(fits, cycle(COLOURS), cycle(MARKERS), strict=False):
            for row in fit["values"]:
                axes.plot(depths, row, color=colour, marker=marker, markersize=4, linestyle="none", alpha=0.7)
            middle = [_geometric_mean(column) for column in zip(*fit["values"], strict=True)]
            centre = _geometric_mean(depths)
            line = [_geometric_mean(middle) * (depth / centre) ** fit["mean"] for depth in depths]
            name = fit["quantity"].replace("_", " ")
            exponent = f"{fit['mean']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})"
            axes.plot(depths, line, color=colour, linewidth=1.1, label=f"{name}: {exponent}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.set_xlabel("depth $L$ of the stage")
        axes.set_title(f"stage {stage['stage'] + 1}: {stage['regime']}", fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=SMALL)
        tidy(axes)
    return figure


def _geometric_mean(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product
