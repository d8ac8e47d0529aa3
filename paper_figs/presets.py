"""Training loss by epoch, and test error, of the presets. Results: ``experiments.presets``."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paper_figs.common import sign
from resode.plots import COLOURS, MARKERS, new_figure, spans_a_decade, tidy, whole_numbers

SOURCE = "presets"


def figure(published: Mapping[str, Any]) -> Figure:
    """Left the loss as seen in training, right a line a case, with a mark a seed, on its data set."""
    cases = published["results"]
    drawn = new_figure(1, 2, width=4.4, height=max(3.2, 1.0 + 0.35 * len(cases)))
    losses, errors = drawn.subplots(1, 2)
    for place, (colour, marker, found) in enumerate(zip(cycle(COLOURS), cycle(MARKERS), cases.values(), strict=False)):
        style = ("-", "--")[place // len(COLOURS) % 2]
        for seed in found["seeds"]:
            label = found["case"] if seed is found["seeds"][0] else None
            epochs = range(1, len(seed["train_loss"]) + 1)
            losses.plot(epochs, seed["train_loss"], style, color=colour, marker=marker, markersize=3, label=label)
            errors.plot(seed["test_error"], place, marker, color=colour, markersize=5)
    _label(losses, errors, cases)
    return sign(drawn, published)


def _label(losses: Axes, errors: Axes, cases: Mapping[str, Mapping[str, Any]]) -> None:
    losses.set_xlabel("epoch")
    losses.set_ylabel("loss in training")
    seen = [seed["train_loss"] for found in cases.values() for seed in found["seeds"]]
    if spans_a_decade([loss for losses_of in seen for loss in losses_of]):
        losses.set_yscale("log")
    else:  # a logarithmic axis would hardly have a number
        losses.set_ylim(bottom=0.0)
    losses.set_xlim(0.5, 0.5 + max(map(len, seen)))
    whole_numbers(losses.xaxis)
    losses.legend(frameon=False, fontsize=8)
    errors.set_xlabel("test error")
    # By itself PercentFormatter has a decimal more than it needs, and such ticks run into each other.
    errors.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    errors.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    worst = max(seed["test_error"] for found in cases.values() for seed in found["seeds"])
    errors.set_xlim(0.0, 1.08 * worst)
    errors.set_ylim(len(cases) - 0.5, -0.5)
    errors.set_yticks(range(len(cases)), [_named(found) for found in cases.values()], fontsize=8)
    for axes in (losses, errors):
        tidy(axes)


def _named(found: Mapping[str, Any]) -> str:
    parameters = found["seeds"][0]["parameters"]
    return f"{found['case']}\n{found['setup']['data']['data'].rpartition('/')[2]}, {parameters / 1e6:.2g} M"
