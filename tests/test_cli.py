"""The command line: what a newcomer sees, and what bad input gives: one line, a non-zero exit, no folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from resode.cli import main
from resode.limits import Certificate
from resode.paths.table import LesionTable
from resode.train import load

SMALL = ["--net", "resnet", "--depth", "8", "--width", "4", "--epochs", "1", "--batch-size", "256"]


def call(*arguments: str) -> int:
    """The exit status of ``resode arguments``."""
    try:
        main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small trained ODE net."""
    out = tmp_path_factory.mktemp("cli") / "ode"
    small = ["--net", "odenet", "--width", "4", "--steps", "2", "--epochs", "1", "--batch-size", "256"]
    assert call("train", *small, "--out", str(out)) == 0
    return out


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "check", "lesion", "spectrum", "limits"])
def test_every_command_explains_itself(command, capsys):
    assert call(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"resode {command}" in said
    assert "(default:" in said or "required" in said


BAD = {
    "net": (["--net", "resnext"], ["resnext", "lenet5", "alexnet", "vgg", "plain", "resnet", "odenet"]),
    "norm": (["--norm", "batsch"], ["batsch", "batch", "layer", "pixel", "instance", "group", "none"]),
    "solver": (["--net", "odenet", "--solver", "rk5"], ["rk5", "euler", "midpoint", "heun", "rk4", "dopri5"]),
    "data set": (["--data", "cifar"], ["cifar", "digits", "mnist", "cifar10", "imagefolder:PATH"]),
    "depth": (["--depth", "21"], ["21", "6n + 2", "20"]),
    "image folder": (["--data", "imagefolder:nowhere"], ["nowhere"]),
    "dropout of 1": (["--dropout.p", "1.0"], ["1.0", "[0, 1)"]),
    "negative dropout": (["--dropout.p", "-0.1"], ["-0.1", "[0, 1)"]),
    "input dropout": (["--input-dropout", "2"], ["2", "[0, 1)"]),
    "rtol": (["--net", "odenet", "--solver", "dopri5", "--rtol", "0"], ["rtol", "0", "above 0"]),
    "atol": (["--net", "odenet", "--solver", "dopri5", "--atol", "-1e-3"], ["atol", "-0.001", "above 0"]),
    "steps and a tolerance": (
        ["--net", "odenet", "--solver", "dopri5", "--steps", "4", "--rtol", "1e-3"],
        ["rtol", "dopri5 shall make 4 steps"],
    ),
    "gradient mode": (["--net", "odenet", "--gradient", "adjoynt"], ["adjoynt", "backprop", "checkpoint"]),
    "random end": (["--net", "odenet", "--steer", "2"], ["steer", "2", "[0, 1]"]),
    "tolerance of fixed steps": (["--net", "odenet", "--rtol", "1e-3"], ["rtol", "rk4", "fixed steps"]),
    "device": (["--device", "cuda:99"], ["cuda:99", "cpu"]),
    "device name": (["--device", "gpu"], ["gpu", "cpu"]),
    "number": (["--depth", "deep"], ["deep", "int"]),
    "option": (["--dept", "20"], ["--dept"]),
    "too many halvings": (["--net", "vgg", "--blocks", "5"], ["vgg", "8×8"]),
    "points in a conv net": (["--data", "moons"], ["points", "mlp"]),
    "augmented points": (["--data", "moons", "--kind", "mlp", "--augment.flip"], ["points", "augment"]),
    "preset": (["--preset", "he2015"], ["he2015", "he2016", "lecture", "fast", "strikes-back-a3", "odenet-mnist"]),
    "learning rate": (["--lr", "0"], ["lr", "0", "above 0"]),
    "patience without validation": (["--patience", "2", "--validation", "0"], ["patience", "validation"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_line_and_leaves_no_folder(name, capsys, tmp_path):
    arguments, expected = BAD[name]
    assert call("train", "--out", "run", *arguments) != 0
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err
    assert line.startswith("resode: ")
    assert line.count("\n") == 1
    assert "Traceback" not in line
    for words in expected:
        assert words in line
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_an_empty_image_folder_is_refused(capsys, tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "test").mkdir()
    assert call("train", "--out", "run", "--data", "imagefolder:images") != 0
    assert "images" in (line := capsys.readouterr().err)
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_configuration_is_refused_and_left_alone(capsys, tmp_path):
    assert call("train", *SMALL, "--out", "run") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call("train", *SMALL, "--out", "run", "--lr", "0.05") != 0
    line = capsys.readouterr().err
    assert "recipe.lr" in line
    assert "0.05" in line
    assert line.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_truncated_checkpoint_is_refused(capsys, tmp_path):
    assert call("train", *SMALL, "--out", "run") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    capsys.readouterr()
    for command in ("evaluate", "lesion"):
        assert call(command, "run") != 0
        line = capsys.readouterr().err
        assert "checkpoint.pt" in line
        assert line.count("\n") == 1


def test_training_prints_the_accuracies_and_the_folder_that_holds_them(capsys, tmp_path):
    assert call("train", *SMALL) == 0
    said = capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert str(run) in said
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "DONE"} <= {
        p.name for p in run.iterdir()
    }
    test = re.search(r"test +accuracy ([\d.]+)%", said)
    assert call("evaluate", str(run)) == 0
    assert f"accuracy {test[1]}%" in capsys.readouterr().out
    assert call("train", *SMALL) == 0, "a finished run is shown again"
    assert f"accuracy {test[1]}%" in capsys.readouterr().out


def test_a_preset_is_where_the_other_flags_begin(capsys, tmp_path):
    small = ["--data", "digits", "--blocks", "2", "--convs", "1", "--batch-size", "512", "--epochs", "1"]
    assert call("train", "--preset", "lecture", *small, "--out", "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["net"]["net"] == "vgg"
    assert (config["net"]["blocks"], config["net"]["convs"]) == (2, 1)
    recipe = config["recipe"]
    assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"]) == ("adam", 1e-3, 0.0)
    assert (recipe["batch_size"], recipe["epochs"]) == (512, 1)
    capsys.readouterr()
    assert call("train", "--preset", "strikes-back-a3", "--help") == 0
    assert "(default: bce)" in capsys.readouterr().out, "help shows the preset's settings"


def test_a_factorized_training_leaves_plain_weights(capsys, tmp_path):
    assert call("train", *SMALL, "--factorize", "--out", "run") == 0
    test = re.search(r"test +accuracy ([\d.]+)%", capsys.readouterr().out)
    assert call("evaluate", "run") == 0
    assert f"accuracy {test[1]}%" in capsys.readouterr().out


def test_a_net_is_pruned_as_far_as_its_validation_accuracy_permits(trained, capsys):
    assert call("evaluate", str(trained)) == 0
    whole = capsys.readouterr().out
    shares = []
    for loss in ("0", "0.05", "0.99"):
        assert call("evaluate", str(trained), "--prune", loss) == 0
        said = re.search(
            r"pruned: ([\d.]+)% of [\d,]+ weights.* ([\d.]+)% \(before ([\d.]+)%\)", capsys.readouterr().out
        )
        share, after, before = map(float, said.groups())
        assert after >= before - 100 * float(loss) - 0.01  # both rounded
        shares.append(share)
    assert shares == sorted(shares)
    assert shares[-1] == 100.0
    assert call("evaluate", str(trained)) == 0
    assert capsys.readouterr().out == whole, "the run keeps its own weights"
    assert call("evaluate", str(trained), "--prune", "1") != 0
    assert "prune is 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("mirrored", [[], ["--mirrored"]])
def test_pruning_watches_the_accuracy_that_is_reported_on_the_validation_split(mirrored, tmp_path, capsys):
    assert call("train", *SMALL, *mirrored, "--out", "run") == 0
    capsys.readouterr()
    assert call("evaluate", "run", "--split", "validation") == 0
    whole = re.search(r"accuracy ([\d.]+)%", capsys.readouterr().out)[1]
    assert call("evaluate", "run", "--split", "validation", "--prune", "0") == 0
    said = capsys.readouterr().out
    assert f"(before {whole}%)" in said
    after = re.search(r"validation split ([\d.]+)%", said)[1]
    assert f"validation: accuracy {after}%" in said


def test_an_ode_net_is_evaluated_with_another_solver(trained, capsys):
    assert call("evaluate", str(trained), "--solver", "euler", "--steps", "5") == 0
    assert "NFE 17" in capsys.readouterr().out, "3 blocks of 5 evaluations, and 2 transitions"
    assert call("evaluate", str(trained), "--solver", "dopri5") == 0
    assert call("evaluate", str(trained), "--solver", "rk5") != 0
    assert "rk4" in capsys.readouterr().err


def test_an_embedded_pair_chooses_its_steps_unless_it_is_told_their_number(trained, capsys):
    def nfe(*settings):
        assert call("evaluate", str(trained), *settings) == 0
        return int(re.search(r"NFE (\d+)", capsys.readouterr().out)[1])

    assert nfe("--solver", "dopri5", "--steps", "4") == 3 * 4 * 6 + 2
    assert nfe("--solver", "dopri5") == nfe("--solver", "dopri5", "--rtol", "1e-3", "--atol", "1e-3")
    assert nfe("--solver", "dopri5", "--rtol", "1e-6", "--atol", "1e-6") > nfe("--solver", "dopri5")


def test_recalibrated_statistics_serve_one_evaluation(trained, capsys):
    before = (trained / "checkpoint.pt").read_bytes()
    said = []
    for more in ([], ["--recalibrate"], ["--recalibrate", "--solver", "euler", "--steps", "7"], []):
        assert call("evaluate", str(trained), *more) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[3]
    assert len(set(said)) == 3
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_recalibration_meets_the_training_images_in_a_random_order(trained, monkeypatch):
    met = []
    monkeypatch.setattr("resode.cli.evaluate.recalibrate", lambda model, data: met.extend(y for _, y in data))
    assert call("evaluate", str(trained), "--recalibrate") == 0
    met, held = torch.cat(met), load(trained).data.train.labels
    assert not torch.equal(met, held)
    assert torch.equal(met.sort().values, held.sort().values)


def test_a_training_by_a_coarse_adjoint_warns_and_a_checkpointed_one_does_not(capsys):
    coarse = ["--net", "odenet", "--width", "4", "--solver", "euler", "--steps", "1", "--epochs", "1"]
    assert call("train", *coarse, "--batch-size", "512", "--gradient", "adjoint", "--out", "adjoint") == 0
    said = capsys.readouterr()
    assert "Warning: The adjoint gradient of the net before training is off by" in said.err
    assert "Warning: The adjoint gradient of the trained net is off by" in said.out
    assert call("train", *coarse, "--batch-size", "512", "--gradient", "checkpoint", "--out", "exact") == 0
    said = capsys.readouterr()
    assert "Warning" not in said.out + said.err


def test_a_reversible_net_with_extra_channels_is_lesioned_by_the_plain_steps_of_its_solver(capsys):
    small = ["--net", "odenet", "--width", "4", "--steps", "2", "--epochs", "1", "--batch-size", "512"]
    assert call("train", *small, "--gradient", "reversible", "--extra-channels", "2", "--out", "run") == 0
    capsys.readouterr()
    assert call("lesion", "run", "--analyses", "single") == 0
    said = capsys.readouterr().out
    assert "trained with reversible steps" in said
    assert said.count("cannot be deleted") == 3 * 2, "the extra channels come and go"
    assert len(re.findall(r"^step +\d+", said, re.MULTILINE)) == 3 * (2 + 2) + 2


def test_settings_that_nothing_would_heed_are_refused(trained, capsys, tmp_path):
    assert call("evaluate", str(trained), "--solver", "dopri5", "--steps", "4", "--rtol", "1e-4") != 0
    assert "dopri5 shall make 4 steps" in capsys.readouterr().err
    assert call("evaluate", str(trained), "--rtol", "1e-4") != 0
    assert "fixed steps" in capsys.readouterr().err
    assert call("train", *SMALL, "--out", "run") == 0
    assert call("evaluate", "run", "--steps", "4") != 0
    assert "no ODE block" in capsys.readouterr().err
    assert call("train", *SMALL, "--out", "group", "--norm", "group") == 0
    assert call("evaluate", "group", "--recalibrate") != 0
    assert "no batch norm" in capsys.readouterr().err


def test_what_an_evaluation_cannot_give_is_refused_before_anything_is_computed(trained, capsys, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("something was computed")

    for name in ("recalibrate", "prune_to_sparse", "monte_carlo", "evaluate"):
        monkeypatch.setattr(f"resode.cli.evaluate.{name}", forbidden)
    assert call("evaluate", str(trained), "--recalibrate", "--prune", "0", "--mc-samples", "5") != 0
    assert "this one has none" in capsys.readouterr().err
    assert call("evaluate", str(trained), "--recalibrate", "--prune", "2") != 0
    assert "prune is 2.0" in capsys.readouterr().err


def test_an_adaptive_net_is_lesioned_by_the_steps_it_makes_or_on_a_grid_of_the_users(capsys):
    small = ["--net", "odenet", "--solver", "bosh3", "--rtol", "1e-1", "--atol", "1e-1", "--width", "4"]
    assert call("train", *small, "--epochs", "1", "--batch-size", "512", "--out", "run") == 0
    capsys.readouterr()
    assert call("lesion", "run", "--analyses", "single") == 0
    said = capsys.readouterr().out
    assert "those that they choose on the first batch" in said
    assert len(re.findall(r"^step +\d+", said, re.MULTILINE)) >= 3 + 2
    grid = ["--solver", "euler", "--steps", "2", "--split", "validation"]
    assert call("lesion", "run", "--analyses", "single", *grid) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^step +\d+", said, re.MULTILINE)) == 3 * 2 + 2
    assert "lesion-validation.json" in said


def test_every_analysis_of_lesion_writes_its_result_and_its_figure(trained, capsys):
    analyses = ("single", "multiple", "permute", "stage", "ensemble")
    few = ["--most", "2", "--draws", "2", "--limit", "50", "--by-class", "--precision", "bfloat16"]
    assert call("lesion", str(trained), "--analyses", *analyses, *few, "--out", "found") == 0
    said = capsys.readouterr().out
    for name in ("lesion", "lesion-multiple", "lesion-permute", "lesion-stage"):
        assert str(Path.cwd() / "found" / "results" / f"{name}.json") in said
        assert (Path("found") / "figures" / f"{name}.png").stat().st_size > 0
    assert (Path("found") / "results" / "ensemble.json").exists()
    table = LesionTable.from_json((Path("found") / "results" / "lesion-multiple.json").read_text())
    assert [(one.number, one.draw) for one in table.lesions] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert table.baseline.count == 50
    assert len(table.baseline.by_class) == 10
    assert "nothing deleted: error" in said
    assert not list(Path("found").glob("progress/*"))


def test_the_usual_analyses_do_not_leave_out_a_setting_that_makes_no_sense(trained, capsys):
    assert call("lesion", str(trained), "--limit", "20", "--draws", "0") != 0
    assert "draws is 0" in capsys.readouterr().err


def test_the_usual_analyses_leave_out_what_a_network_has_no_steps_for(capsys):
    narrow = ["--net", "vgg", "--blocks", "2", "--convs", "1", "--width", "4", "--epochs", "1", "--batch-size", "512"]
    assert call("train", *narrow, "--out", "run") == 0
    capsys.readouterr()
    assert call("lesion", "run", "--limit", "20", "--draws", "1") == 0
    said = capsys.readouterr().out
    assert "permute is left out: no two of these steps" in said
    assert said.splitlines()[-1].startswith("nothing deleted: error")
    assert call("lesion", "run", "--limit", "20", "--analyses", "single", "permute") != 0
    assert "no two of these steps" in capsys.readouterr().err


def test_a_plain_net_loses_its_layers(capsys):
    plain = ["--net", "plain", *SMALL[2:]]
    assert call("train", *plain, "--out", "plain") == 0
    assert call("lesion", "plain", "--analyses", "layer", "--limit", "20") == 0
    assert "cannot be deleted" in capsys.readouterr().out
    assert call("train", *SMALL, "--out", "run") == 0
    capsys.readouterr()
    assert call("lesion", "run", "--analyses", "layer") != 0
    assert "no layer without a shortcut" in capsys.readouterr().err


def test_a_spectrum_writes_what_adds_up_to_the_gradient(trained, capsys):
    assert call("spectrum", str(trained), "--limit", "8", "--by-step", "--out", "found") == 0
    said = capsys.readouterr().out
    found = json.loads((Path("found") / "results" / "spectrum.json").read_text())
    exact, sampled = found["exact"], found["sampled"]
    assert exact["samples"] == 8
    assert len(exact["shares"]) == len(exact["counts"]) == 3 * 2 + 2 + 1
    assert sum(exact["shares"]) == pytest.approx(1.0, abs=1e-4)
    assert sum(exact["counts"]) == sum(sampled["counts"]) == 2**8
    assert {"first", "last", "share", "paths"} == set(found["effective"])
    for name in ("spectrum", "spectrum-by-step"):
        assert (Path("found") / "figures" / f"{name}.png").stat().st_size > 0
        assert str(Path.cwd() / "found" / "results" / f"{name}.json") in said
    assert call("spectrum", str(trained), "--limit", "8", "--grade", "evaluation", "--out", "found-too") == 0
    found = json.loads((Path("found-too") / "results" / "spectrum.json").read_text())
    assert len(found["exact"]["counts"]) == 3 * 2 * 4 + 2 + 1


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (["--paths", "1"], "samples is 1: at least 2"),
        (["--paths", "-3"], "samples is -3: at least 2"),
        (["--share", "0"], "share is 0.0"),
        (["--limit", "0"], "limit is 0"),
    ],
)
def test_a_setting_of_a_spectrum_is_refused_before_anything_is_computed(setting, says, trained, capsys, monkeypatch):
    monkeypatch.setattr("resode.paths.spectrum.gradient", lambda *arguments: pytest.fail("it was computed"))
    assert call("spectrum", str(trained), *setting, "--out", "found") != 0
    assert says in capsys.readouterr().err


@pytest.fixture
def images(tmp_path):
    """A folder of images of three classes, and weights of a small network for them."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        place = tmp_path / "images" / "test" / name
        place.mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(place / f"{i}.png")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "weights.pt")
    return ["--data", "imagefolder:images", "--weights", "weights.pt"]


def test_a_network_by_name_is_lesioned_and_has_a_spectrum(images, capsys):
    assert call("lesion", "torchvision:resnet18", *images, "--analyses", "single") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^step +\d+ +layer\d\.\d", said, re.MULTILINE)) == 8
    assert "on 6 samples" in said
    (run,) = Path("runs").iterdir()
    assert {"config.json", "environment.json", "results", "figures"} <= {path.name for path in run.iterdir()}
    assert call("spectrum", "torchvision:resnet18", *images, "--limit", "3", "--paths", "2", "--out", "found") == 0
    exact = json.loads((Path("found") / "results" / "spectrum.json").read_text())["exact"]
    assert (exact["samples"], sum(exact["counts"])) == (3, 2**8)


def test_what_does_not_go_with_a_network_is_refused(images, trained, capsys):
    wrong = {
        ("torchvision:resnet18",): "needs images, --data imagefolder:PATH",
        ("torchvision:resnet18", *images[:2]): "holds 3 classes, and the model has 1000",
        ("torchvision:resnet18", *images, "--steps", "3"): "steps is given",
        ("torchvision:resnet19", *images): "unknown model 'resnet19'",
        ("torchvision:resnet18", *images, "--split", "train"): "train",
        (str(trained), "--weights", "weights.pt"): "a run has its own",
    }
    for arguments, says in wrong.items():
        assert call("lesion", *arguments) != 0
        line = capsys.readouterr().err
        assert says in line
        assert line.count("\n") == 1
    assert not Path("runs").exists(), "nothing was made"


def test_lesion_and_limits_write_results_and_figures(trained, capsys):
    assert call("lesion", str(trained), "--analyses", "single") == 0
    few = ["--samples", "20", "--few", "8"]
    assert call("limits", str(trained), "--steps", "1", "2", "--solvers", "euler", "rk4", *few) == 0
    said = capsys.readouterr().out
    for name in ("lesion", "limits", "certificate"):
        for path in (f"results/{name}.json", f"figures/{name}.png"):
            assert str(trained / path) in said
            assert (trained / path).stat().st_size > 0
    assert said.count("cannot be deleted") == 0
    assert len(re.findall(r"^step +\d+", said, re.MULTILINE)) == 3 * 2 + 2


def test_limits_lifts_a_residual_net_for_its_certificate_and_refuses_a_plain_one(capsys):
    assert call("train", *SMALL, "--out", "run") == 0
    capsys.readouterr()
    assert (
        call("limits", "run", "--samples", "20", "--few", "8", "--split", "validation", "--precision", "float64") == 0
    )
    said = capsys.readouterr().out
    assert "is lifted" in said
    found = Certificate.from_dict(json.loads((Path("run") / "results" / "certificate-validation.json").read_text()))
    assert found.lifted
    assert (found.count, found.swap.count, found.distance.count) == (20, 20, 8)
    assert found.verdict.words in said
    assert found.swap.rounding < 1e-12
    assert found.initial_bias is not None
    assert call("limits", "run", "--analyses", "convergence") != 0
    assert "ODE blocks" in capsys.readouterr().err
    assert call("train", "--net", "plain", *SMALL[2:], "--out", "plain") == 0
    capsys.readouterr()
    assert call("limits", "plain") != 0
    assert "no step of the network is residual" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "lesion", "spectrum", "limits"])
def test_a_folder_that_is_no_run_is_refused(command, capsys, tmp_path):
    assert call(command, "nowhere") != 0
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert call(command, "other") != 0
    assert "not a run" in capsys.readouterr().err


def test_python_dash_m_resode_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "resode", "train", "--norm", "no"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert done.stderr.startswith("resode: ")
    assert done.stderr.count("\n") == 1
