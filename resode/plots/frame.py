"""What all our panels share: size, colours, frame, grid."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers alone: epochs, steps and lengths, even of a single one, have no others."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def spans_a_decade(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis serves ``values``: none is 0 or less, and the largest is 10 times the smallest."""
    return min(values, default=0.0) > 0.0 and max(values) > 10.0 * min(values)


def legend_of(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of all the panels, each label once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def shade_stages(axes: Axes, stages: Sequence[int]) -> None:
    """Shade every second of the ``stages``, by the place of each step."""
    for stage in sorted(set(stages)):
        if stage % 2:
            members = [i for i, s in enumerate(stages) if s == stage]
            axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color="#f2f2f2", zorder=0)
