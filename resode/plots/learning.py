"""How nets are trained, and how a flow moves points."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from resode.plots.frame import COLOURS, MARKERS, Records, new_figure, tidy, whole_numbers


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
        whole_numbers(axes.xaxis)
        tidy(axes)
        if key == "train_accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
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
