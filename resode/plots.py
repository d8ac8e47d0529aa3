"""Pictures of results. Every function takes plain values, as results on disk hold them, and returns a figure.

Nothing here knows a model: a figure can be drawn again from a run folder without building one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

Records = Sequence[Mapping[str, Any]]

# Okabe & Ito's colours, told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 4.2, height: float = 3.2) -> Figure:
    """An empty figure for ``rows`` × ``columns`` panels of ``width`` × ``height`` inches."""
    return Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=150)


def tidy(axes: Axes) -> None:
    """The frame and grid that all our panels have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def training(histories: Mapping[str, Records]) -> Figure:
    """Loss and training accuracy by epoch, a curve for each net (where there are several seeds, for each seed).

    Args:
        histories: the records of ``fit`` by the name of the net; names that differ only behind a "#" are seeds of
            one net, and share a colour.
    """
    figure = new_figure(1, 2)
    nets = list(dict.fromkeys(name.split("#")[0] for name in histories))
    for axes, key, label in zip(
        figure.subplots(1, 2), ("train_loss", "train_accuracy"), ("training loss", "training accuracy"), strict=True
    ):
        seen = set()
        for name, records in histories.items():
            net = name.split("#")[0]
            axes.plot(
                [record["epoch"] for record in records],
                [record[key] for record in records],
                color=COLOURS[nets.index(net) % len(COLOURS)],
                marker=MARKERS[nets.index(net) % len(MARKERS)],
                markersize=3,
                linewidth=1.2,
                label=None if net in seen else net,
            )
            seen.add(net)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
        if key == "train_accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
    return figure


def lesions(tables: Mapping[str, Mapping[str, Any]], chance: float | None = None, split: str = "test") -> Figure:
    """Error of each net without one of its steps, by the step deleted; stages are shaded in turn.

    Args:
        tables: lesion tables (``LesionTable.to_dict``) by the name of the net.
        chance: the error of guessing, drawn as a line.
        split: the split of the data on which they were measured.
    """
    figure = new_figure(len(tables), 1, width=7.5, height=2.3)
    panels = figure.subplots(len(tables), 1, sharey=True, squeeze=False)[:, 0]
    for (name, table), axes, colour in zip(tables.items(), panels, COLOURS, strict=False):
        steps = table["lesions"]
        _shade_stages(axes, [step["stage"] for step in steps])
        made = [(i, step["error"]) for i, step in enumerate(steps) if step["error"] is not None]
        axes.bar([i for i, _ in made], [error for _, error in made], color=colour, width=0.8)
        axes.axhline(table["error"], color="black", linewidth=1.0, linestyle="--", label="none deleted")
        if chance is not None:
            axes.axhline(chance, color=GREY, linewidth=1.0, linestyle=":", label="guessing")
        impossible = [i for i, step in enumerate(steps) if step["error"] is None]
        axes.plot(impossible, [0.03] * len(impossible), "x", color=GREY, label="not deletable" if impossible else None)
        axes.set_title(
            f"{name} (error {table['error']:.1%} on {table['count']} {split} samples)", fontsize=9, loc="left"
        )
        axes.set_xlim(-0.7, len(steps) - 0.3)
        axes.set_ylim(0, 1.0)
        axes.set_ylabel("error")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    panels[-1].set_xlabel("index of the deleted step (shading: stages)")
    figure.legend(*_legend(panels), frameon=False, fontsize=8, ncols=4, loc="outside upper right")
    return figure


def _legend(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of all the panels, each label once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _shade_stages(axes: Axes, stages: Sequence[int]) -> None:
    for stage in sorted(set(stages)):
        if stage % 2:
            members = [i for i, s in enumerate(stages) if s == stage]
            axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color="#f2f2f2", zorder=0)


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


def trajectories(paths: Sequence[Sequence[Sequence[float]]], labels: Sequence[int]) -> Figure:
    """The flow of points in the plane: a line for each point, from its start (hollow) to its end (filled).

    Args:
        paths: positions, (T, N, 2).
        labels: class of each of the N points.
    """
    figure = new_figure(width=4.6, height=4.2)
    axes = figure.subplots()
    for i, label in enumerate(labels):
        xs, ys = [state[i][0] for state in paths], [state[i][1] for state in paths]
        colour = COLOURS[label % len(COLOURS)]
        axes.plot(xs, ys, color=colour, linewidth=0.5, alpha=0.6)
        axes.plot(xs[:1], ys[:1], "o", color=colour, markersize=3, fillstyle="none", markeredgewidth=0.6)
        axes.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=3)
    axes.set_xlabel("$h_1$")
    axes.set_ylabel("$h_2$")
    axes.set_aspect("equal", adjustable="datalim")
    tidy(axes)
    return figure
