"""``resode check``: a line a question, a report, a picture, and the exit status."""

import json

import pytest
from matplotlib.figure import Figure

from resode.cli import main
from resode.plots.check import check as picture_of
from resode.report import png

SMALL = ["--net", "resnet", "--depth", "8", "--width", "8"]


def call(*arguments):
    """The exit status of ``resode check arguments``."""
    try:
        main(["check", *arguments])
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("net", [SMALL, ["--net", "odenet", "--width", "8", "--steps", "1", "--solver", "midpoint"]])
def test_a_sound_training_passes(net, tmp_path, capsys):
    assert call(*net, "--augment.crop", "1", "--out", "found") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 8
    assert all(line.startswith("pass  ") for line in said[:6])
    assert said[6:] == ["Report: found/check.json", "Figure: found/check.png"]
    report = json.loads((tmp_path / "found" / "check.json").read_text())
    assert report["passed"] is True
    assert [f"pass  {f['name']}: {f['said']}" for f in report["findings"]] == said[:6]
    assert report["setup"]["stack"]["augment"]["crop"] == 1
    assert (tmp_path / "found" / "check.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["check.json", "check.png"]


def test_labels_drawn_at_random_fail_and_everything_is_written_all_the_same(tmp_path, capsys):
    assert call("--data", "moons", "--kind", "mlp", "--depth", "8", "--label-noise", "1") == 1
    said = capsys.readouterr().out
    assert said.count("FAIL  ") == 1
    assert "FAIL  learns from the inputs" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("check-moons-resnet-seed-0-")
    assert json.loads((folder / "check.json").read_text())["passed"] is False
    assert (folder / "check.png").exists()


def test_what_makes_no_sense_is_one_line_and_writes_nothing(tmp_path, capsys):
    assert call("--device", "gpu") == 1
    assert call("--depth", "21") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert list(tmp_path.iterdir()) == []


OUTPUTS = [{"name": "a", "mean": 0.0, "std": 1.0, "shares": [0.1, 0.6, 0.3]}] * 2
GRADIENTS = [{"name": "a", "norm": 0.1, "weight": 2.0}, {"name": "b", "norm": 0.0, "weight": 3.0}]
REST = {"labels": [3, 1], "edges": [-1.0, 0.0, 1.0, 2.0], "outputs": OUTPUTS, "gradients": GRADIENTS}
RED, BLUE = [[[255, 255]], [[0, 0]], [[0, 0]]], [[[0, 0]], [[0, 0]], [[255, 255]]]


def panels(figure: Figure):
    return [axes for part in figure.subfigs for axes in part.axes]


def test_the_picture_shows_colours_and_labels():
    axes = panels(picture_of({"inputs": [RED, BLUE], **REST}))
    assert len(axes) == 4
    assert [a.get_title() for a in axes[:2]] == ["3", "1"]
    shown = axes[0].images[0].get_array()
    assert shown.shape == (1, 2, 3)
    assert shown[0].tolist() == [[255, 0, 0]] * 2
    grey = panels(picture_of({"inputs": [[[[0, 9]]], [[[5, 5]]]], **REST}))
    assert grey[0].images[0].get_array().tolist() == [[0, 9]]


def test_the_picture_shows_outputs_and_gradients():
    *_, outputs, gradients = panels(picture_of({"inputs": [[0.0, 1.0], [1.0, 0.5]], **REST}))
    (mesh,) = outputs.collections
    assert mesh.get_array().tolist() == [pytest.approx([v, v]) for v in (1 / 6, 1.0, 0.5)]
    curves = {line.get_label(): list(line.get_ydata()) for line in gradients.lines}
    assert curves["gradient"][0] == 0.1
    assert curves["weight"] == [2.0, 3.0]
    assert [line.get_xdata()[0] for line in gradients.lines if line.get_linestyle() == ":"] == [2]


def test_a_gradient_that_is_not_finite_and_layers_that_are_not_there_can_be_drawn():
    broken = [{"name": "a", "norm": None, "weight": 1.0}]
    for gradients, outputs in ((broken, OUTPUTS), ([], [])):
        figure = picture_of({"inputs": [RED], **REST, "gradients": gradients, "outputs": outputs, "labels": [0]})
        assert png(figure).startswith(b"\x89PNG")
