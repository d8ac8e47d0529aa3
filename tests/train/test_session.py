"""Sessions: what is refused before a folder is made, what a kill leaves, and a trained net from its folder."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from resode import Dropout, InvalidInput, Recipe, Run, RunError, Stack, TrainingError
from resode.data import Augment
from resode.data import load as load_data
from resode.nets import Architecture, parameter_count
from resode.train import Data, Setup, check_device, evaluate, load, session, train

TIMINGS = ("seconds", "images_per_second")
TINY = Setup(
    architecture=Architecture(depth=8, width=4),
    stack=Stack(dropout=Dropout(p=0.1), augment=Augment(shift=1)),
    recipe=Recipe(epochs=2, batch_size=400, lr=0.05),
)
ON_POINTS = Setup(
    architecture=Architecture(net="odenet", kind="mlp", steps=2),
    data=Data(data="moons"),
    recipe=Recipe(epochs=2, batch_size=400, lr=0.05),
)


@pytest.fixture(autouse=True)
def _global_state():
    """Whatever a test (or a defect) sets for the whole process is set back."""
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of TINY, and the model as training left it."""
    models = []
    build = session.nets.build

    def remember(*args):
        models.append(build(*args))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.nets, "build", remember)
        run = train(TINY, tmp_path_factory.mktemp("runs") / "tiny")
    return run, models[0].eval()


def everything_in(folder):
    """The bytes of every file of a run but its lock."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def untimed(run):
    """All that a run found, without how long it took."""
    records = [{key: value for key, value in record.items() if key not in TIMINGS} for record in run.metrics()]
    return records, {key: value for key, value in run.result("train").items() if key != "seconds"}


def alike(one, two):
    """Whether two checkpoints hold the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(alike, one, two))
    return one == two


# A run


def test_a_run_holds_what_was_asked_and_what_was_found(trained):
    run, model = trained
    assert run.done
    assert set(run.config) == {"net", "data", "recipe"}
    assert run.config["net"]["size"] == [8, 8]
    assert run.config["net"]["stack"]["dropout"]["p"] == 0.1
    assert run.config["recipe"]["batch_size"] == 400
    assert run.config["data"]["data"] == "digits"
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    found = run.result("train")
    assert set(found) == {"train", "validation", "test", "nfe", "parameters", "epochs", "seconds"}
    assert [found[split]["count"] for split in ("train", "validation", "test")] == [1294, 144, 359]
    assert found["parameters"] == parameter_count(model)
    assert (found["nfe"], found["epochs"]) == (3, 2)
    assert found["seconds"] == sum(record["seconds"] for record in run.metrics())
    # What is found is of the final weights, in evaluation mode, on images as they are.
    data = TINY.data.load(0, "cpu")
    for split in ("train", "validation", "test"):
        metrics = evaluate(model, data.batches(split, 512))
        assert (found[split]["loss"], found[split]["accuracy"]) == (metrics.loss, metrics.accuracy)
    assert found["validation"]["loss"] == run.metrics()[-1]["validation_loss"]


def test_without_a_validation_split_none_is_reported(tmp_path):
    run = train(replace(ON_POINTS, data=Data(data="moons", validation=0.0)), tmp_path / "run")
    assert [split for split in ("train", "validation", "test") if split in run.result("train")] == ["train", "test"]


def test_a_finished_run_is_returned_untouched(trained, monkeypatch):
    run, _ = trained
    before = everything_in(run.path)
    monkeypatch.setattr(session, "fit", lambda *args, **kwargs: pytest.fail("it was trained again"))
    again = train(TINY, run.path)
    assert again.done
    assert again.path == run.path
    assert everything_in(run.path) == before


def test_the_same_setup_gives_the_same_numbers_and_another_seed_others(trained, tmp_path):
    run, _ = trained
    again = train(TINY, tmp_path / "again")
    assert untimed(again) == untimed(run)
    assert alike(again.load_checkpoint(), run.load_checkpoint())
    other = train(replace(TINY, recipe=replace(TINY.recipe, seed=1)), tmp_path / "other")
    assert untimed(other)[0][0]["train_loss"] != untimed(run)[0][0]["train_loss"]
    assert other.result("train")["test"] != run.result("train")["test"]


def test_the_images_are_augmented_in_training_and_not_in_what_is_found(trained, tmp_path):
    run, _ = trained
    plain = train(replace(TINY, stack=replace(TINY.stack, augment=Augment())), tmp_path / "run")
    (one, *_), (other, *_) = run.metrics(), plain.metrics()
    # The first step has seen other images; but for them, all is one: the weights, the order, the masks.
    assert one["train_loss"] != other["train_loss"]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.1)


def test_the_global_random_state_is_left_as_it_was(tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train(ON_POINTS, tmp_path / "run")
    load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_lets_go_of_its_lock(trained):
    Run.open(trained[0].path, write=True).close()


# Deterministic algorithms


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_deterministic_algorithms_are_for_the_training_alone(tmp_path, monkeypatch, before):
    seen = []
    fit = session.fit

    def watched(*args, **kwargs):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return fit(*args, **kwargs)

    monkeypatch.setattr(session, "fit", watched)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    setup = replace(ON_POINTS, recipe=Recipe(epochs=1, batch_size=400, deterministic=True))
    train(setup, tmp_path / "run")
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert now == before
    assert seen == [(True, ":4096:8")]
    with pytest.raises(InvalidInput):
        train(replace(setup, data=Data(data="moons", validation=-1.0)), tmp_path / "other")
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert now == before


def test_without_being_asked_nothing_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **_: mode and pytest.fail("it was set"))
    train(ON_POINTS, tmp_path / "run")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


# Refusals, before any folder is made

FLAT = Architecture(kind="mlp", depth=8)
MOONS = Data(data="moons")


@pytest.mark.parametrize(
    ("settings", "device", "says"),
    [
        ({}, "cuda:99", "device 'cuda:99' is not there: this machine has cpu"),
        ({}, "abacus", "device 'abacus' is not there"),
        ({"data": Data(validation=0.9999)}, "cpu", "leaves one part empty"),
        ({"data": Data(image_size=0)}, "cpu", "image_size is 0"),
        ({"recipe": Recipe(seed=-1)}, "cpu", "seed is -1"),
        ({"architecture": Architecture(net="lenet5")}, "cpu", "lenet5 halves its images too often for 8×8"),
        ({"architecture": FLAT}, "cpu", "'mlp' needs points"),
        ({"data": MOONS}, "cpu", "'basic' needs images"),
        (
            {"architecture": FLAT, "data": MOONS, "stack": Stack(augment=Augment(flip=True))},
            "cpu",
            "cannot augment inputs of shape.*turn the augmentation off",
        ),
        ({"stack": Stack(augment=Augment(crop=8))}, "cpu", "can leave nothing of images of 8 × 8"),
        ({"data": Data(image_size=4), "stack": Stack(norm="instance")}, "cpu", "instance norm averages"),
        ({"stack": Stack(norm="batch", norm_affine="elementwise")}, "cpu", "elementwise"),
        ({"data": Data(validation=0.0), "recipe": Recipe(patience=3)}, "cpu", "patience needs a validation split"),
        ({"recipe": Recipe(batch_size=1)}, "cpu", "batch norm averages over a batch"),
        ({"data": Data(data="moons", data_dir="x"), "architecture": Architecture(net="vgg")}, "cpu", "'vgg'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path, settings, device, says):
    setup = replace(TINY, stack=Stack(), **settings) if "stack" not in settings else replace(TINY, **settings)
    with pytest.raises(InvalidInput, match=says):
        train(setup, tmp_path / "made" / "run", device=device)
    assert list(tmp_path.iterdir()) == []


def test_data_that_do_not_exist_are_refused_when_they_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="unknown data set 'digit'"):
        Data(data="digit")
    with pytest.raises(InvalidInput, match="there is no folder"):
        Data(data=f"imagefolder:{tmp_path / 'nowhere'}")


def test_the_devices_there_are():
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(InvalidInput, match="this machine has cpu"):
        check_device("tpu")


def test_a_folder_of_another_training_is_refused_and_kept(trained):
    run, _ = trained
    before = everything_in(run.path)
    for setup, key in (
        (replace(TINY, recipe=replace(TINY.recipe, lr=0.06)), r"recipe\.lr is 0\.05 there, 0\.06 here"),
        (replace(TINY, stack=Stack()), r"net\.stack\.dropout\.p is 0\.1 there, 0\.0 here"),
        (replace(TINY, data=Data(label_noise=0.1)), r"data\.label_noise is 0\.0 there, 0\.1 here"),
        (ON_POINTS, "another configuration"),
    ):
        with pytest.raises(RunError, match=key):
            train(setup, run.path)
        assert everything_in(run.path) == before


def test_a_folder_of_anything_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match="not a run folder"):
        train(TINY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_leaves_an_unfinished_run(tmp_path):
    setup = replace(ON_POINTS, recipe=replace(ON_POINTS.recipe, weight_decay=1e30, schedule="constant"))
    with pytest.raises(TrainingError, match="at step"):
        train(setup, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert not run.done
    assert not (run.path / "results").exists()
    Run.open(run.path, write=True).close()


# Interruptions


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    """The folders that ``mortal.py`` makes, and the exit codes of its processes."""
    folder = tmp_path_factory.mktemp("mortal")
    script = Path(__file__).with_name("mortal.py")
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        # From Python 3.12 on, a fork is warned of where there are threads.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script), str(folder)],
        env=os.environ | threads,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return folder, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_a_killed_training_resumes_to_the_same_numbers_wherever_it_died(mortal, net):
    folder, report = mortal
    whole = Run.open(folder / net / "whole")
    assert whole.done
    expected, checkpoint = untimed(whole), whole.load_checkpoint()
    assert [record["epoch"] for record in expected[0]] == [1, 2, 3]
    deaths = [name for name in report[net] if name != "whole"]
    assert len(deaths) >= 4
    for name in deaths:
        *killed, last = report[net][name]
        assert killed == [-9] * len(killed), name
        assert killed, name
        assert last == 0, name
        run = Run.open(folder / net / name)
        assert run.done, name
        assert untimed(run) == expected, name
        assert alike(run.load_checkpoint(), checkpoint), name
        assert everything_in(run.path).keys() == everything_in(whole.path).keys(), name
    assert len(report[net]["mayfly"]) > 3


def test_a_killed_run_says_that_it_was_continued(mortal):
    folder, _ = mortal
    for name, count in (("whole", 0), ("backward-5", 1)):
        environment = json.loads((folder / "resnet" / name / "environment.json").read_text())
        assert len(environment["continued"]) == count


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_an_interrupt_from_the_keyboard_leaves_a_run_to_resume(trained, tmp_path, monkeypatch, steps):
    left = [steps]
    backward = torch.Tensor.backward

    def interrupted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return backward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert not run.done
    assert len(run.metrics()) == steps // 3
    again = train(TINY, tmp_path / "run")
    assert again.done
    assert untimed(again) == untimed(trained[0])
    assert alike(again.load_checkpoint(), trained[0].load_checkpoint())


def test_a_run_in_the_making_is_not_trained_by_two(tmp_path, monkeypatch):
    fit = session.fit

    def meanwhile(*args, **kwargs):
        with pytest.raises(RunError, match="is being written by"):
            train(ON_POINTS, tmp_path / "run")
        return fit(*args, **kwargs)

    monkeypatch.setattr(session, "fit", meanwhile)
    assert train(ON_POINTS, tmp_path / "run").done


# Loading


def test_a_loaded_net_is_the_trained_one(trained):
    run, model = trained
    found = load(run.path)
    assert not any(module.training for module in found.model.modules())
    data = TINY.data.load(0, "cpu")
    for split in ("train", "validation", "test"):
        held, again = getattr(data, split), getattr(found.data, split)
        assert torch.equal(held.inputs, again.inputs)
        assert torch.equal(held.labels, again.labels)
    x = data.standardize(data.test.inputs)
    with torch.no_grad():
        assert torch.equal(found.model(x), model(x))
    assert evaluate(found.model, found.data.batches("test", 512)).loss == run.result("train")["test"]["loss"]
    assert found.run.path == run.path


def test_an_unfinished_training_can_be_loaded_once_it_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(ON_POINTS, tmp_path / "run")
    found = load(str(tmp_path / "run"))
    assert not found.run.done
    assert found.model(torch.rand(4, 2)).shape == (4, 2)


def test_a_path_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no run at"):
        load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run folder"):
        load(tmp_path)


def test_a_run_of_something_else_is_an_error(tmp_path):
    Run.create(tmp_path / "run", {"steps": 3, "data": {}}).close()
    with pytest.raises(RunError, match=r"holds no training \(its config has no net, recipe\)"):
        load(tmp_path / "run")


def test_a_run_made_of_trainings_says_where_they_are(tmp_path):
    with Run.create(tmp_path / "demo", {}) as outer:
        Run.create(outer.path / "trainings" / "resnet-seed-0", {}).close()
    with pytest.raises(RunError, match=r"give one of its own trainings, .*demo/trainings/resnet-seed-0 for one"):
        load(tmp_path / "demo")


def test_a_run_without_a_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(ON_POINTS, tmp_path / "run")
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load(tmp_path / "run")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in trained[0].path.rglob("*"):
        if path.is_file() and path.parent == trained[0].path and path.name != ".lock":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error(copy, share):
    whole = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RunError, match=r"cannot load the checkpoint .*damaged"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("net", "unknown settings of a net: depht"),
        ("data", "made by another version of resode: it sets depht"),
    ],
)
def test_a_config_of_another_version_is_an_error(copy, part, says):
    config = json.loads((copy / "config.json").read_text())
    config[part]["depht"] = 20
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((RunError, InvalidInput), match=says):
        load(copy)


def test_a_checkpoint_of_another_net_is_an_error(copy):
    config = json.loads((copy / "config.json").read_text())
    config["net"]["width"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="does not fit the net of its config"):
        load(copy)


def test_the_data_may_have_moved(copy, monkeypatch):
    seen = []

    def remember(name, **settings):
        seen.append((name, settings["data_dir"], settings["seed"], settings["validation"]))
        return load_data(name, **settings)

    monkeypatch.setattr(session.data, "load", remember)
    load(copy)
    load(copy, data_dir="/elsewhere")
    assert seen == [("digits", "data", 0, 0.1), ("digits", "/elsewhere", 0, 0.1)]


def test_a_folder_of_images_may_have_moved(tmp_path):
    for i, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / "here" / place).mkdir(parents=True)
        for k in range(2):
            Image.new("L", (8, 8), 40 * i + k).save(tmp_path / "here" / place / f"{k}.png")
    small = Architecture(net="resnet", depth=8, width=4)
    setup = Setup(
        architecture=small,
        data=Data(data=f"imagefolder:{tmp_path / 'here'}", validation=0.0),
        recipe=Recipe(epochs=1, batch_size=4),
    )
    train(setup, tmp_path / "run")
    before = load(tmp_path / "run").data.test.inputs
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(InvalidInput, match="here"):
        load(tmp_path / "run")
    after = load(tmp_path / "run", data_dir=str(tmp_path / "there")).data.test.inputs
    assert torch.equal(before, after)


def test_a_device_that_is_not_there_is_an_error(trained):
    with pytest.raises(InvalidInput, match="device 'cuda:99' is not there"):
        load(trained[0].path, device="cuda:99")


def test_a_setup_makes_the_net_for_the_shapes_of_its_data():
    data = load_data("digits", image_size=12)
    setup = Setup(architecture=Architecture(net="lenet5"), stack=Stack(norm="group"), data=Data(image_size=12))
    config = setup.net_config(data)
    assert (config.net, config.channels, config.size, config.classes) == ("lenet5", 1, (12, 12), 10)
    assert config.stack == Stack(norm="group")
    assert isinstance(session.nets.build(config, 0), nn.Module)
