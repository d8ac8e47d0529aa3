"""The loss along its gradient, in training with norms and without. Results: ``experiments.smoothness``."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figs.common import sign
from resode.plots import COLOURS, new_figure, tidy, whole_numbers

SOURCE = "smoothness"
NETS = {"resnet": "residual net", "odenet": "ODE net"}
NORMS = {"none": "without norm", "batch": "batch norm", "group": "group norm"}
PANELS = {
    "loss_range": "loss along the gradient",
    "gradient_range": "change of the gradient",
    "beta": "effective β",
}


def figure(published: Mapping[str, Any]) -> Figure:
    """A row for each net, a colour for each norm, by the epochs done.

    Ranges over the step sizes are bands, a band for each seed; β is a line for each seed.
    """
    found = published["results"]
    shown = {each["net"] for each in found.values()}
    rows = [*(net for net in NETS if net in shown), *sorted(shown - NETS.keys())]
    drawn = new_figure(len(rows), len(PANELS), width=3.0, height=2.4)
    panels = drawn.subplots(len(rows), len(PANELS), sharex=True, sharey="col", squeeze=False)
    for row, net in zip(panels, rows, strict=True):
        for axes, (key, title) in zip(row, PANELS.items(), strict=True):
            for each in found.values():
                if each["net"] == net:
                    _draw(axes, key, each)
            axes.set_yscale("log")
            axes.set_title(f"{NETS.get(net, net)}: {title}", fontsize=8, loc="left")
            whole_numbers(axes.xaxis)
            tidy(axes)
    for axes in panels[-1]:
        axes.set_xlabel("epochs done")
    panels[0, -1].legend(frameon=False, fontsize=8)
    return sign(drawn, published)


def _draw(axes: Axes, key: str, found: Mapping[str, Any]) -> None:
    colour = COLOURS[list(NORMS).index(found["norm"]) if found["norm"] in NORMS else -1]
    label: str | None = NORMS.get(found["norm"], found["norm"])
    for seed in found["seeds"]:
        values = seed["epochs"][key]
        epochs = range(len(values))
        if key == "beta":
            axes.plot(epochs, _numbers(values), color=colour, linewidth=1.2, label=label)
        else:
            low, high = (_numbers(column) for column in zip(*values, strict=True))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
        label = None


def _numbers(values: Sequence[float | None]) -> list[float]:
    """What was not finite leaves a gap."""
    return [nan if value is None else value for value in values]
