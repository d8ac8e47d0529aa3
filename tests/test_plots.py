"""Figures show the numbers they were given."""

import base64

import pytest
from matplotlib.figure import Figure

from resode import plots
from resode.report import Picture, Table, png, write_report
from resode.runs import Run


def score(error):
    return {"count": 10, "error": error, "loss": 1.0}


LESIONS = {
    "baseline": score(0.1),
    "lesions": [
        {"stage": 0, "score": score(0.2)},
        {"stage": 0, "score": None},
        {"stage": 1, "score": score(0.7)},
    ],
}
EVALUATIONS = [
    {"solver": s, "steps": n, "nfe": n, "accuracy": 0.9, "loss": 0.2, "logit_error": e, "order": None}
    for s, n, e in (("euler", 1, 0.5), ("euler", 2, 0.25), ("rk4", 1, 0.1), ("rk4", 2, 0.01))
]
CONVERGENCE = {
    "count": 10,
    "reference_steps": 8,
    "reference_accuracy": 0.95,
    "reference_loss": 0.1,
    "trained": [["rk4", 2]],
    "evaluations": EVALUATIONS,
}
RECORDS = [{"epoch": i, "train_loss": 1.0 / i, "train_accuracy": 1 - 0.5 / i} for i in (1, 2, 3)]


def test_lesions_draws_a_bar_for_each_deletion_and_marks_what_cannot_be_deleted():
    figure = plots.lesions({"a": LESIONS, "b": LESIONS}, chance=0.9)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert [bar.get_height() for bar in axes.containers[0]] == [0.2, 0.7]
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"] == [[1]]
        levels = [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        assert 0.1 in levels
        assert 0.9 in levels


def test_convergence_draws_a_curve_for_each_solver_on_logarithmic_axes():
    error, accuracy = plots.convergence(CONVERGENCE).axes
    assert error.get_xscale() == error.get_yscale() == accuracy.get_xscale() == "log"
    assert accuracy.get_yscale() == "linear"
    curves = {line.get_label(): list(line.get_ydata()) for line in error.lines}
    assert curves["euler"] == [0.5, 0.25]
    assert curves["rk4"] == [0.1, 0.01]
    assert 0.95 in [line.get_ydata()[0] for line in accuracy.lines]


def test_training_gives_seeds_of_a_net_one_colour_and_one_label():
    figure = plots.training({"one#0": RECORDS, "one#1": RECORDS, "two#0": RECORDS})
    loss = figure.axes[0]
    assert len(loss.lines) == 3
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["one", "two"]
    assert list(loss.lines[0].get_ydata()) == [record["train_loss"] for record in RECORDS]


@pytest.mark.parametrize("last", [1, 2, 60])
def test_epochs_and_steps_have_ticks_at_whole_numbers_alone(last):
    records = [{"epoch": i, "train_loss": 1.0, "train_accuracy": 0.5} for i in range(1, last + 1)]
    deleted = {**LESIONS, "lesions": [{"stage": 0, "score": score(0.2)}] * last}
    for figure in (plots.training({"net": records}), plots.lesions({"net": deleted})):
        png(figure)
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks, "of a single one, too"
        assert all(tick == round(tick) for tick in ticks)


def test_trajectories_draws_a_line_from_start_to_end_for_each_point():
    paths = [[[0.0, 0.0], [1.0, 1.0]], [[0.5, 0.1], [1.5, 0.9]], [[1.0, 0.2], [2.0, 0.8]]]
    (axes,) = plots.trajectories(paths, [0, 1]).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0.0, 0.5, 1.0], [1.0, 1.5, 2.0]]
    assert lines[0].get_color() != lines[1].get_color()


@pytest.mark.parametrize(
    "figure", [plots.lesions({"a": LESIONS}), plots.convergence(CONVERGENCE), plots.training({"a": RECORDS})]
)
def test_nothing_reaches_beyond_the_edge_of_the_picture(figure: Figure):
    png(figure)
    page = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= page.y1 + 1


def test_a_report_escapes_its_texts_and_holds_its_pictures(tmp_path):
    sections = [
        Picture("one", "A < B", "what & see", plots.convergence(CONVERGENCE)),
        Table("T", "caption", ("head",), [("<script>",)]),
    ]
    with Run.create(tmp_path / "run", {"a": 1}) as run:
        report, picture = write_report(run, "Title", ["intro <b>"], sections)
    page = report.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "intro &lt;b&gt;" in page
    assert base64.b64encode(picture.read_bytes()).decode() in page


SPECTRUM = {
    "exact": {"counts": [1, 2, 1], "norms": [0.1, 0.4, 0.2], "shares": [0.2, 0.9, -0.1], "norm": 0.5},
    "sampled": {"norms": [0.1, 0.3, 0.2], "totals": [0.1, 0.6, 0.2]},
    "effective": {"first": 1, "last": 2},
}


def test_a_spectrum_draws_counts_norms_totals_and_shares():
    count, single, size, share = plots.spectrum({"net": SPECTRUM}).axes
    assert list(count.lines[0].get_ydata()) == [0.25, 0.5, 0.25]
    assert list(single.lines[0].get_ydata()) == [0.1, 0.3, 0.2]
    exact, totals, bar = (list(line.get_ydata()) for line in size.lines)
    assert exact == pytest.approx([0.2, 0.8, 0.4])
    assert totals == pytest.approx([0.2, 1.2, 0.4])
    assert list(share.lines[0].get_ydata()) == [0.2, 0.9, -0.1]
    assert single.get_yscale() == size.get_yscale() == "log"
    assert count.get_yscale() == share.get_yscale() == "linear"
    assert list(size.lines[2].get_xdata()) == [0.6, 2.4], "the effective lengths, 1 and 2"
    assert "bars" in size.get_xlabel()
    assert bar[0] == bar[1] < 0.1, "at the bottom of the panel"


def test_a_spectrum_without_samples_has_no_more_than_the_exact_parts():
    count, single, size, _ = plots.spectrum({"net": {"exact": SPECTRUM["exact"]}}).axes
    assert len(count.lines) == len(size.lines) == 1
    assert not single.lines
    assert "bars" not in size.get_xlabel()


def test_spectra_by_step_draw_a_row_for_each_step_and_a_line_between_stages():
    found = {"shares": [[0.1, 0.9], [0.3, 0.7], [1.0, 0.0]], "stages": [0, 1, 2]}
    axes, bar = plots.spectra_by_step(found).axes
    (image,) = axes.images
    assert image.get_array().tolist() == [[0.3, 0.7], [1.0, 0.0]]
    assert [line.get_ydata()[0] for line in axes.lines] == [0.5]
    assert bar.get_ylabel() == "share of the gradient"
