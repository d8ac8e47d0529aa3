"""The figures of committed results can be read: nothing is cut off, and no words stand on others."""

import itertools
from functools import cache

import pytest
from matplotlib.figure import Figure

from paper_figs import bench_ode, convergence, presets
from paper_figs.__main__ import FIGURES, results_of
from paper_figs.common import read


@cache
def drawn(module) -> list[Figure]:
    """The figures of ``module``, laid out as in their files."""
    figures = [module.figure(read(path)) for path in results_of(module)]
    for figure in figures:
        figure.draw_without_rendering()
    return figures


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.__name__)
def test_no_words_run_over_the_edge_or_into_their_neighbours(module):
    for figure in drawn(module):
        page = figure.bbox
        for text in (figure._supxlabel, *(legend for legend in figure.legends)):
            box = text.get_window_extent()
            assert box.x0 >= page.x0 - 1
            assert box.x1 <= page.x1 + 1
        for axes in figure.axes:
            ticks = [text for text in axes.get_xticklabels() if text.get_text() and text.get_visible()]
            inside = [
                t for t in ticks if axes.bbox.x0 - 1 <= t.get_window_extent().x0 + t.get_window_extent().width / 2
            ]
            boxes = sorted((text.get_window_extent() for text in inside), key=lambda box: box.x0)
            assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_the_number_of_a_bar_stands_within_it():
    """Behind it, it would be read as that of the diamond beside it."""
    (figure,) = drawn(bench_ode)
    for axes in figure.axes[:2]:
        said = [text for text in axes.texts if text.get_text().replace(".", "").isdigit()]
        assert len(said) == len(axes.patches)
        for text, bar in zip(said, axes.patches, strict=True):
            assert float(text.get_text()) == pytest.approx(bar.get_width(), abs=0.005)
            assert text.get_window_extent().x1 <= bar.get_window_extent().x1


def test_trainings_with_few_steps_come_before_those_with_many():
    (figure,) = drawn(convergence)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles.index("trained: euler, 4 steps") < titles.index("trained: euler, 16 steps")


def test_small_errors_have_short_ticks():
    for figure in drawn(presets):
        labels = [text.get_text() for text in figure.axes[1].get_xticklabels()]
        assert all(label.endswith("%") and len(label) <= 5 for label in labels)
