"""Multi-level training: refined at given epochs, interrupted and resumed, loaded again, and from the command line."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resode import InvalidInput, NetConfig, ODEBlock, Recipe, Run, RunError, Stack, build, fit
from resode.cli import main
from resode.data import load as load_data
from resode.limits import Refine, refine
from resode.nets import Architecture
from resode.nets.sequences import keeps_shape
from resode.train import Data, Setup, evaluate, load, session, train
from resode.train.recipe import make_optimizer

TIMINGS = ("seconds", "images_per_second")
NETS = {
    "resnet": {"net": "resnet", "depth": 14, "scale": "skipinit"},
    "tied": {"net": "resnet", "depth": 20, "tied": True, "time": "concat"},
    "odenet": {"net": "odenet", "steps": 2, "time": "constant", "kind": "preact"},
}


@pytest.fixture(scope="module")
def digits():
    """A few of the digits: 80 to train on, 40 to validate."""
    whole = load_data("digits", validation=0.2)
    return replace(whole, train=whole.train.take(slice(80)), validation=whole.validation.take(slice(40)))


def net_of(name, seed=0):
    return build(NetConfig(**NETS[name], width=4, size=(8, 8), channels=1), seed)


def recipe_of(name, **settings):
    optimizer = {"optimizer": "adamw", "lr": 0.003} if name == "odenet" else {"lr": 0.05}
    return Recipe(**{"epochs": 4, "batch_size": 40, "refine": (1, 3), **optimizer, **settings})


def depths(net):
    """The number of steps in each stage."""
    return [
        sum(block.steps if isinstance(block, ODEBlock) else keeps_shape(block) for block in stage)
        for stage in net.stages
    ]


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def same(one, other):
    """Bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Watch:
    """A callback that notes the depths at which each epoch begins, and may interrupt the training before one."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def __call__(self, model, optimizer, epoch):
        if epoch == self.stop:
            raise KeyboardInterrupt
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == set(model.parameters())
        self.seen.append((epoch, sum(depths(model))))


# Training


@pytest.mark.parametrize("name", NETS)
def test_the_net_is_refined_after_the_epochs_that_the_recipe_says(name, digits):
    net, watch = net_of(name), Watch()
    first = sum(depths(net))
    records = fit(net, digits, recipe_of(name), callbacks=[watch])
    assert watch.seen == [(0, first), (1, 2 * first), (2, 2 * first), (3, 4 * first)]
    assert sum(depths(net)) == 4 * first
    assert all(torch.isfinite(torch.tensor(record["train_loss"])) for record in records)
    assert records[3]["train_loss"] < records[0]["train_loss"]
    assert [record["nfe"] for record in records] == sorted(record["nfe"] for record in records)


@pytest.mark.parametrize("name", NETS)
def test_a_callback_does_what_the_recipe_does(name, digits):
    nets = [net_of(name), net_of(name)]
    one = fit(nets[0], digits, recipe_of(name))
    other = fit(nets[1], digits, recipe_of(name, refine=()), callbacks=[Refine((1,)), Refine((3,))])
    assert untimed(one) == untimed(other)
    assert same(nets[0].state_dict(), nets[1].state_dict())


def test_training_goes_on_with_the_momentum_it_had(digits):
    """Against a loop by hand, whose second epoch begins with a net made of the first one's, and its momenta."""
    recipe = recipe_of("resnet", epochs=2, refine=(1,), schedule="constant")
    net, coarse = net_of("resnet"), net_of("resnet")
    fit(net, digits, recipe)

    def epoch(model, optimizer, number):
        model.train()
        order = torch.Generator().manual_seed(2 * number)
        for x, labels in digits.batches("train", 40, generator=order, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    before = make_optimizer(recipe, coarse)
    epoch(coarse, before, 0)
    fine = refine(coarse)
    after = make_optimizer(recipe, fine)
    momentum = {name: before.state[p]["momentum_buffer"] for name, p in coarse.named_parameters()}
    for name, p in fine.named_parameters():
        part, stage, place, *rest = name.split(".")
        if part == "stages":
            first = int(stage != "0")  # the block that changes the shape
            copied = int(place) >= first
            place = str(first + (int(place) - first) // 2) if copied else place
            held = momentum[".".join([part, stage, place, *rest])]
            after.state[p]["momentum_buffer"] = held / 2 if copied and rest != ["scale"] else held.clone()
        else:
            after.state[p]["momentum_buffer"] = momentum[name].clone()
    epoch(fine, after, 1)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fine.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "stop"), [("resnet", 1), ("resnet", 2), ("resnet", 3), ("tied", 2), ("odenet", 1), ("odenet", 3)]
)
def test_a_resumed_training_is_the_uninterrupted_one(name, stop, digits, tmp_path):
    recipe, whole = recipe_of(name), net_of(name)
    with Run.create(tmp_path / "whole", {}) as run:
        expected = fit(whole, digits, recipe, run=run)
        checkpoint = run.load_checkpoint()
    with Run.create(tmp_path / "cut", {}) as run, pytest.raises(KeyboardInterrupt):
        fit(net_of(name), digits, recipe, run=run, callbacks=[Watch(stop)])
    net, watch = net_of(name), Watch()
    with Run.create(tmp_path / "cut", {}) as run:
        records = fit(net, digits, recipe, run=run, callbacks=[watch])
        assert same(run.load_checkpoint(), checkpoint)
    assert untimed(records) == untimed(expected)
    assert same(net.state_dict(), whole.state_dict())
    # Callbacks have seen each epoch once more, those that were done first.
    assert [epoch for epoch, _ in watch.seen] == [0, 1, 2, 3]


def test_patience_counts_from_the_last_refinement_and_restores_weights_of_its_level(digits, tmp_path):
    net = net_of("resnet")
    recipe = recipe_of("resnet", epochs=6, refine=(3,), patience=3)
    seen = []

    def watch(model, optimizer, epoch):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    records = fit(net, digits, recipe, callbacks=[watch])
    after = [record["validation_accuracy"] for record in records[3:]]
    best = 3 + after.index(max(after))
    assert evaluate(net, digits.batches("validation", 512)).accuracy == records[best]["validation_accuracy"]
    assert net.state_dict().keys() == seen[-1].keys()
    # A checkpoint whose best weights are those of a level is resumed with them.
    with Run.create(tmp_path / "cut", {}) as run, pytest.raises(KeyboardInterrupt):
        fit(net_of("resnet"), digits, recipe, run=run, callbacks=[Watch(5)])
    again = net_of("resnet")
    with Run.create(tmp_path / "cut", {}) as run:
        fit(again, digits, recipe, run=run)
    assert same(again.state_dict(), net.state_dict())


def test_it_goes_with_a_number_of_active_steps(digits):
    net = net_of("resnet")
    records = fit(net, digits, recipe_of("resnet", active_steps=2))
    assert len(records) == 4
    assert sum(depths(net)) == 16


# Refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"refine": (0,)}, r"refine after epochs \(0,\): whole numbers of at least 1, increasing"),
        ({"refine": (2, 1)}, "increasing"),
        ({"refine": (1, 1)}, "increasing"),
        ({"refine": (1.5,)}, "whole numbers"),
        ({"refine": (4,)}, "refine after epoch 4 of 4: nothing would be trained after it"),
    ],
)
def test_epochs_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        recipe_of("resnet", **settings)
    if settings["refine"] != (4,):
        with pytest.raises(InvalidInput, match=says):
            Refine(settings["refine"])


def test_a_factor_that_makes_no_net_finer_is_refused_before_anything_is_trained():
    with pytest.raises(InvalidInput, match="factor is 1: a whole number of at least 2"):
        Refine((1,), factor=1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"net": "plain", "depth": 8}, "this Net has no depth to change"),
        ({"net": "odenet", "solver": "dopri5"}, "dopri5 to a tolerance chooses its steps"),
    ],
)
def test_a_net_that_cannot_be_refined_is_refused_before_it_is_trained(settings, says, digits, tmp_path):
    net = build(NetConfig(**settings, width=4, size=(8, 8), channels=1), 0)
    with pytest.raises(InvalidInput, match=says):
        fit(net, digits, recipe_of("resnet"))
    setup = Setup(architecture=Architecture(**settings, width=4), recipe=recipe_of("resnet"))
    with pytest.raises(InvalidInput, match=says):
        train(setup, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_structure_is_refused(digits, tmp_path):
    with Run.create(tmp_path / "run", {}) as run, pytest.raises(KeyboardInterrupt):
        fit(net_of("resnet"), digits, recipe_of("resnet"), run=run, callbacks=[Watch(3)])
    with Run.create(tmp_path / "run", {}) as run, pytest.raises(RunError, match="does not fit the net"):
        fit(net_of("resnet"), digits, recipe_of("resnet", refine=()), run=run)


# Sessions


POINTS = Setup(
    architecture=Architecture(net="odenet", kind="mlp", steps=2, solver="euler", time="linear"),
    stack=Stack(norm="none", activation="tanh"),
    data=Data(data="moons"),
    recipe=Recipe(epochs=3, batch_size=400, lr=0.05, refine=(1, 2)),
)


@pytest.mark.parametrize("net", ["odenet", "resnet"])
def test_a_refined_net_is_loaded_from_its_run(net, tmp_path):
    setup = replace(POINTS, architecture=replace(POINTS.architecture, net=net, depth=8, scale="1/L"))
    run = train(setup, tmp_path / "run")
    assert json.loads((run.path / "config.json").read_text())["recipe"]["refine"] == [1, 2]
    trained = load(run.path)
    assert depths(trained.model) == ([8] if net == "odenet" else [12])
    found = evaluate(trained.model, trained.data.batches("test", 512))
    assert run.result("train")["test"]["accuracy"] == found.accuracy
    assert run.result("train")["test"]["loss"] == found.loss
    assert run.result("train")["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert train(setup, run.path).done


@pytest.mark.parametrize("done", [1, 2])
def test_a_net_is_loaded_as_deep_as_it_is_by_then(done, tmp_path, monkeypatch):
    def interrupted(*args, **settings):
        return fit(*args, callbacks=[Watch(done)], **settings)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(POINTS, tmp_path / "run")
    assert depths(load(tmp_path / "run").model) == [2 * 2 ** (done - 1)]
    resumed, whole = train(POINTS, tmp_path / "run"), train(POINTS, tmp_path / "whole")
    assert untimed(resumed.metrics()) == untimed(whole.metrics())
    assert resumed.result("train")["test"] == whole.result("train")["test"]


def test_runs_made_before_there_was_such_a_setting_are_loaded(tmp_path):
    run = train(replace(POINTS, recipe=replace(POINTS.recipe, refine=())), tmp_path / "run")
    config = json.loads((run.path / "config.json").read_text())
    assert config["recipe"].pop("refine") == []
    (run.path / "config.json").write_text(json.dumps(config))
    assert depths(load(run.path).model) == [2]


@pytest.mark.parametrize("net", ["odenet", "resnet"])
def test_the_command_line_refines(net, tmp_path, capsys):
    settings = "--data moons --kind mlp --steps 2 --depth 8 --width 4 --epochs 3 --batch-size 400 --refine 1 2"
    main(["train", "--net", net, *settings.split(), "--out", str(tmp_path / "run")])
    assert depths(load(tmp_path / "run").model) == ([8] if net == "odenet" else [12])
    nfe = 8 * 4 if net == "odenet" else 12
    assert f"NFE {nfe}" in capsys.readouterr().out
