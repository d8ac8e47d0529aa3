"""Every experiment runs in its smoke configuration and publishes its results; every figure is drawn from such."""

import importlib
import json

import pytest

import experiments.common
from paper_figs.__main__ import FIGURES, file_name, results_of
from paper_figs.__main__ import main as draw_all
from paper_figs.common import provenance, read

EXPERIMENTS = (
    "lesion",
    "spectrum",
    "convergence",
    "scaling_at_init",
    "scaling_trained",
    "degradation",
    "depth_limit",
    "smoothness",
    "trajectories",
    "bench_ode",
    "gradient_product",
    "bench_paths",
    "bench_train",
    "bench_airbench",
    "presets",
    "loop_parity",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published results of each experiment's smoke configuration."""
    folder = tmp_path_factory.mktemp("experiments")
    for name in EXPERIMENTS:
        module = importlib.import_module(f"experiments.{name}")
        arguments = ["smoke", "--out", str(folder / name), "--publish", str(folder)]
        experiments.common.main(name, "A question.", module.CONFIGS, module.run, arguments)
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_carry_their_provenance(published, name):
    found = json.loads((published / f"{name}-smoke.json").read_text())
    assert found["experiment"] == name
    assert found["results"]
    assert {"versions", "device", "git", "command", "time"} <= set(found["environment"])


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.__name__)
def test_figures_are_drawn_from_results_and_say_which(published, module):
    found = read(published / f"{module.SOURCE}-smoke.json")
    figure = module.figure(found)
    assert all(axes.has_data() for axes in figure.axes)
    assert figure.get_supxlabel() == provenance(found)


def test_every_committed_result_of_a_figure_can_be_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("paper_figs.__main__.OUT", tmp_path / "out")
    draw_all()
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {file_name(module, path) for module in FIGURES for path in results_of(module)}
    assert len(drawn) == sum(len(results_of(module)) for module in FIGURES)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_the_named_configurations(name):
    assert {"smoke", "cpu"} <= set(importlib.import_module(f"experiments.{name}").CONFIGS)


def test_a_changed_setting_goes_to_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from experiments import trajectories

    for extra in ([], ["--seed", "1"]):
        experiments.common.main("trajectories", "?", trajectories.CONFIGS, trajectories.run, ["smoke", *extra])
    folders = sorted(path.name for path in (tmp_path / "runs" / "experiments").iterdir())
    assert folders[0] == "trajectories-smoke"
    assert folders[1].startswith("trajectories-smoke-")
