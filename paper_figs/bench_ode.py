"""What a solve costs with others, over what it costs here; and peak memory. Results: ``experiments.bench_ode``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paper_figs.common import sign
from resode.plots import COLOURS, GREY, new_figure, tidy

SOURCE = "bench_ode"
TITLES = {"same module": "(a) the same module, every solver", "as written": "(b) each as its users write it"}
PEERS = ("torchdiffeq", "torchdyn", "torchode", "resode")
GAP = 1.3
"""Between the groups of bars, in bars."""
Group = tuple[str, list[dict[str, Any]]]
"""A name, and the bars under it."""


def figure(published: Mapping[str, Any]) -> Figure:
    """A panel a table: bars in each one's faster layout, diamonds as each is fed by default; below, peak memory."""
    found = published["results"]["bench"]
    arithmetic = {row["case"]: row["arithmetic"] for row in found["rows"] if row["precision"] != "float32"}
    tables = {name: _groups(cases, arithmetic) for name, cases in found["summary"].items() if name in TITLES}
    memory = [
        (case, [{"who": who, "mib": mib} for who, mib in those["peak_mib"].items()])
        for cases in found["summary"].values()
        for case, those in cases.items()
        if "peak_mib" in those
    ]
    panels = [*tables.values(), *([memory] if memory else [])]
    sizes = [_height(groups) for groups in panels]
    drawn = new_figure(width=7.0, height=0.15 * sum(sizes) + 0.65 * len(panels) + 0.5)
    axes = drawn.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for panel, (name, groups) in zip(axes, tables.items(), strict=False):
        _ratios(panel, groups)
        panel.set_title(TITLES[name], fontsize=9, loc="left")
    right = max(panel.get_xlim()[1] for panel in axes[: len(tables)])
    for panel in axes[: len(tables)]:
        panel.set_xlim(0.0, right)
    if memory:
        _memory(axes[-1], memory)
        axes[-1].set_title("(c) peak memory of one forward and backward pass", fontsize=9, loc="left")
    drawn.legend(handles=_keys(tables), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return sign(drawn, published)


def _groups(cases: Mapping[str, Any], arithmetic: Mapping[str, str]) -> list[Group]:
    """For each case (and each way of ours in it) the others, each with its ratios by way."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case, those in cases.items():
        for each in those["ratios"]:
            way = each["ours"].partition(", ")[2]
            title = f"{case}, {way}" if way and way not in case else case
            title += f" ({arithmetic[case]})" if case in arithmetic else ""
            found.setdefault(title, {}).setdefault(each["other"], {})[each["way"]] = each
    return [(title, [{"who": who, **ways} for who, ways in others.items()]) for title, others in found.items()]


def _height(groups: Sequence[Group]) -> float:
    return sum(len(bars) + GAP for _, bars in groups)


def _placed(axes: Axes, groups: Sequence[Group]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The place of each bar; the groups get their names on the left."""
    top, ticks = 0.0, []
    for title, bars in groups:
        for i, bar in enumerate(bars):
            yield top + i, bar
        ticks.append((top + (len(bars) - 1) / 2, title))
        top += len(bars) + GAP
    axes.set_yticks([at for at, _ in ticks], [_two_lines(text) for _, text in ticks], fontsize=7)
    axes.set_ylim(top - GAP, -1.0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.15)
    tidy(axes)
    axes.grid(False, axis="y")


def _two_lines(text: str) -> str:
    """What comes behind "solver, steps, size" goes below."""
    parts = text.split(", ")
    return ", ".join(parts[:3]) + ("\n" + ", ".join(parts[3:]) if len(parts) > 3 else "")


def _ratios(axes: Axes, groups: Sequence[Group]) -> None:
    for at, bar in _placed(axes, groups):
        best, default = bar["best"], bar["default"]
        axes.barh(at, best["ratio"], height=0.85, color=_colour(bar["who"]))
        axes.plot([best["min"], best["max"]], [at, at], color="black", linewidth=0.8)
        axes.plot(default["ratio"], at, "D", markersize=3.2, color="white", markeredgecolor="black")
        # Within the bar: behind it, the number would stand beside the diamond, which has another.
        axes.annotate(
            f"{best['ratio']:.2f}",
            (0.0, at),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            color="white",
        )
        if ", " in bar["who"]:
            _say(axes, max(best["max"], default["ratio"], 1.0), at, bar["who"])
    axes.axvline(1.0, color=GREY, linewidth=1.0)
    axes.set_xlabel("time of the other / time of ours", fontsize=8)


def _memory(axes: Axes, groups: Sequence[Group]) -> None:
    for at, bar in _placed(axes, groups):
        axes.barh(at, bar["mib"], height=0.85, color=_colour(bar["who"]))
        number = f"{bar['mib']:.0f}"
        _say(axes, bar["mib"], at, f"{number}  {bar['who']}" if ", " in bar["who"] else number)
    axes.set_xlim(0.0, 1.4 * max(bar["mib"] for _, bars in groups for bar in bars))  # room for the words
    axes.set_xlabel("MiB", fontsize=8)


def _say(axes: Axes, x: float, y: float, text: str) -> None:
    """Write ``text`` behind a bar: whose it is where the colour does not say it, the number where none else is near."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=6)


def _colour(who: str) -> str:
    return COLOURS[PEERS.index(who.partition(",")[0])]


def _keys(tables: Mapping[str, Sequence[Group]]) -> list[Any]:
    there = {bar["who"].partition(",")[0] for groups in tables.values() for _, bars in groups for bar in bars}
    keys: list[Any] = [Patch(color=_colour(peer), label=peer) for peer in PEERS if peer in there]
    keys.append(Line2D([], [], color="black", linewidth=0.8, label="range over the rounds"))
    diamond = {"marker": "D", "markersize": 3.2, "color": "white", "markeredgecolor": "black", "linestyle": ""}
    return [*keys, Line2D([], [], **diamond, label="as fed by default (bars: each in its faster layout)")]
