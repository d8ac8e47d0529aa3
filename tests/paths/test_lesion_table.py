"""Tables of lesions: as JSON, as CSV, and their pictures, which show the numbers they hold."""

import csv
import io
import json
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
from by_hand import batches, net_of, view_of
from scipy.stats import t as student

from resode import plots
from resode.paths import delete, lesion, noise, scale
from resode.paths.scores import Score
from resode.paths.table import Lesion, LesionTable
from resode.report import png

BASIC, PLAIN = (view_of(net_of(family)) for family in ("basic", "plain"))
DATA, LAYERS = batches("basic"), batches("plain")
MADE = {
    "single": lesion.single(BASIC, DATA),
    "plain": lesion.single(PLAIN, LAYERS, by_class=True),
    "multiple": lesion.multiple(BASIC, DATA, most=3, draws=4),
    "permute": lesion.permute(BASIC, DATA, numbers=(0, 1, 4), draws=2),
    "stage": lesion.stage(BASIC, DATA, by_class=True),
    "layer": lesion.layer(PLAIN, LAYERS),
    "interventions": lesion.interventions(BASIC, DATA, {"all but one": delete(1), "half": scale(0.5, stage=1)}),
}


def told_apart(table):
    """The table with errors of which no two are equal: nets of random weights err alike."""
    lesions = [
        one if one.score is None else replace(one, score=replace(one.score, error=(i * 7 % 19 + 1) / 23))
        for i, one in enumerate(table.lesions)
    ]
    return replace(table, lesions=tuple(lesions))


TABLES = {name: told_apart(table) for name, table in MADE.items()}


def score(error, **changed):
    return Score(100, error, (max(0.0, error - 0.1), min(1.0, error + 0.1)), 1.0, (0.9, 1.1), **changed)


# JSON


@pytest.mark.parametrize("name", TABLES)
def test_a_table_survives_json_and_its_file(tmp_path, name):
    table, path = TABLES[name], tmp_path / "deep" / "table.json"
    text = table.to_json(path)
    assert path.read_text() == text
    assert LesionTable.from_json(text) == table
    assert LesionTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert LesionTable.from_json(text).made == tuple(one for one in table.lesions if one.score is not None)
    assert table.to_json() == text
    assert [each.name for each in path.parent.iterdir()] == ["table.json"]


def test_a_loss_that_is_no_number_is_null_in_json_and_nan_again():
    whole = score(0.5)
    lost = Score(100, 1.0, (0.9, 1.0), math.nan, (math.nan, math.nan))
    table = LesionTable("single", whole, (Lesion("a", (0,), score=lost),))
    text = table.to_json()
    assert json.loads(text, parse_constant=pytest.fail)["lesions"][0]["score"]["loss"] is None
    again = LesionTable.from_json(text)
    (one,) = again.made
    assert math.isnan(one.score.loss)
    assert all(math.isnan(bound) for bound in one.score.loss_interval)
    assert (again.baseline, one.score.error) == (whole, 1.0)


# CSV


@pytest.mark.parametrize("name", TABLES)
def test_csv_has_a_row_for_the_baseline_and_one_for_each_lesion(tmp_path, name):
    table = TABLES[name]
    text = table.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    first, *others = rows
    assert (first["label"], first["number"], first["tau"]) == ("baseline", "0", "1.0")
    for row, one in zip(others, table.lesions, strict=True):
        assert row["label"] == one.label
        assert tuple(map(int, row["steps"].split())) == one.steps
        assert tuple(map(int, row["order"].split())) == (one.order or ())
        for key in ("kind", "stage", "t", "number", "draw", "tau"):
            value = getattr(one, key)
            assert row[key] == ("" if value is None else str(value))
    for row, found in zip(rows, [table.baseline, *(one.score for one in table.lesions)], strict=True):
        if found is None:
            assert {row[key] for key in ("count", "error", "error_low", "loss", "loss_high", "by_class")} == {""}
            continue
        assert int(row["count"]) == found.count
        assert (float(row["error"]), float(row["loss"])) == (found.error, found.loss)
        assert (float(row["error_low"]), float(row["error_high"])) == found.error_interval
        assert (float(row["loss_low"]), float(row["loss_high"])) == found.loss_interval
        by_class = row["by_class"].split(" ") if row["by_class"] else []
        expected = found.by_class or ()
        assert [float(each) if each else None for each in by_class] == pytest.approx(list(expected), rel=1e-5)
    assert any(row["error"] == "" for row in rows) == (name in ("plain", "layer"))


def test_labels_with_commas_and_quotes_survive_csv():
    table = LesionTable("interventions", score(0.1), (Lesion('a, "b"\nc', (1, 2), score=score(0.2)),))
    rows = list(csv.DictReader(io.StringIO(table.to_csv(), newline="")))
    assert rows[1]["label"] == 'a, "b"\nc'


# Pictures


def levels(axes):
    """Heights of the horizontal lines, by label."""
    return {line.get_label(): line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]}


def words(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("chance", [None, 0.75])
@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_a_picture_with_and_without_the_level_of_chance(name, chance):
    table = TABLES[name]
    figure = table.plot("my net", chance)
    png(figure)
    (axes,) = figure.axes
    assert levels(axes).get("guessing") == chance
    assert ("guessing" in words(figure)) == (chance is not None)
    assert axes.get_ylim() == (0.0, 1.0)
    assert axes.get_ylabel() == "error"
    shown = [axes.get_title(loc="left"), *words(figure)]
    assert any("my net" in each for each in shown)
    page = figure.bbox
    box = axes.get_tightbbox()
    assert box.x0 >= page.x0 - 1
    assert box.x1 <= page.x1 + 1
    assert box.y0 >= page.y0 - 1
    assert box.y1 <= page.y1 + 1


@pytest.mark.parametrize("name", ["single", "plain", "stage", "layer", "interventions"])
def test_the_bars_are_the_errors_and_crosses_mark_what_cannot_be_deleted(name):
    table = TABLES[name]
    figure = table.plot(split="validation")
    (axes,) = figure.axes
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches if bar in axes.containers[0]
    }
    assert bars == {i: one.score.error for i, one in enumerate(table.lesions) if one.score is not None}
    crosses = [i for line in axes.lines if line.get_marker() == "x" for i in line.get_xdata()]
    assert crosses == [i for i, one in enumerate(table.lesions) if one.score is None]
    assert levels(axes)["none deleted"] == table.baseline.error
    assert axes.get_title(loc="left") == f"(error {table.baseline.error:.1%} on 11 validation samples)"
    assert table.plot("net").axes[0].get_title(loc="left") == f"net (error {table.baseline.error:.1%} on 11 samples)"


def test_stages_and_changes_are_named_below_their_bars():
    (axes,) = TABLES["stage"].plot().axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_xlabel() == "deleted stage"
    (axes,) = TABLES["interventions"].plot().axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["all but one", "half"]
    assert "step" not in axes.get_xlabel()
    assert "step" in TABLES["single"].plot().axes[0].get_xlabel()
    assert "layer" in TABLES["layer"].plot().axes[0].get_xlabel()


def test_every_second_stage_is_shaded():
    (axes,) = TABLES["single"].plot().axes
    bands = [patch for patch in axes.patches if patch not in axes.containers[0]]
    assert [(band.get_x(), band.get_width()) for band in bands] == [(2.5, 3.0)]  # steps 3 … 5, of stage 1


def test_error_by_number_shows_each_draw_and_their_mean_with_its_interval():
    table = TABLES["multiple"]
    (axes,) = table.plot("my net").axes
    errors = {k: [one.score.error for one in table.lesions if one.number == k] for k in (1, 2, 3)}
    dots, curve = axes.lines
    assert list(dots.get_xdata()) == [0] + [k for k in errors for _ in errors[k]]
    assert list(dots.get_ydata()) == [table.baseline.error] + [error for found in errors.values() for error in found]
    assert list(curve.get_xdata()) == [0, 1, 2, 3]
    assert list(curve.get_ydata()) == pytest.approx([table.baseline.error, *map(mean, errors.values())])
    band = {(x, round(y, 9)) for x, y in axes.collections[0].get_paths()[0].vertices}
    for k, found in errors.items():
        half = student.ppf(0.975, 3) * stdev(found) / 2
        for bound in (max(0.0, mean(found) - half), min(1.0, mean(found) + half)):
            assert (float(k), round(bound, 9)) in band


def test_error_by_order_has_a_point_for_each_draw_and_the_order_of_the_training_first():
    table = TABLES["permute"]
    (axes,) = table.plot("my net").axes
    (points,) = axes.lines
    assert list(points.get_xdata()) == [1.0, *(one.tau for one in table.lesions)]
    assert list(points.get_ydata()) == [table.baseline.error, *(one.score.error for one in table.lesions)]
    left, right = axes.get_xlim()
    assert left > right
    assert left >= 1.0


@pytest.mark.parametrize("name", ["single", "multiple", "permute"])
def test_more_nets_than_colours_are_all_drawn(name):
    draw = {"single": plots.lesions, "multiple": plots.by_number, "permute": plots.by_order}[name]
    table, count = TABLES[name].to_dict(), len(plots.COLOURS) + 2
    figure = draw({f"net {i}": table for i in range(count)})
    if name == "single":
        assert [len(axes.containers) for axes in figure.axes] == [1] * count
    else:
        assert [word for word in words(figure) if word.startswith("net")] == [f"net {i}" for i in range(count)]


def test_a_single_draw_has_no_interval_and_numbers_are_drawn_in_order():
    lesions = tuple(Lesion(f"{k} deleted", (), number=k, draw=0, score=score(0.1 * k)) for k in (5, 2, 9))
    (axes,) = LesionTable("multiple", score(0.0), lesions).plot("net").axes
    curve = axes.lines[1]
    assert list(curve.get_xdata()) == [0, 2, 5, 9]
    assert list(curve.get_ydata()) == pytest.approx([0.0, 0.2, 0.5, 0.9])
    vertices = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in vertices.round(9).tolist()} == {(0.0, 0.0), (2.0, 0.2), (5.0, 0.5), (9.0, 0.9)}


def test_a_table_read_from_an_older_file_needs_no_order():
    values = TABLES["multiple"].to_dict()
    for one in values["lesions"]:
        del one["order"]
    assert LesionTable.from_dict(values) == TABLES["multiple"]


def test_a_table_of_lesions_that_cannot_be_made_is_drawn():
    table = replace(TABLES["single"], lesions=tuple(replace(one, score=None) for one in TABLES["single"].lesions))
    (axes,) = table.plot("net").axes
    assert not axes.containers[0]
    png(table.plot())
    noisy = lesion.interventions(BASIC, DATA, [noise(0.1, i) for i in range(9)])
    png(noisy.plot("a net with long names below", 0.9))
