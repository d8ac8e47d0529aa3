"""Experiments on nets of several depths: trainings of their own nets, and what is taken up after an interruption."""

from dataclasses import replace

import pytest
import torch

import experiments.scaling_at_init as at_init
import experiments.scaling_trained as in_training
from experiments import degradation
from experiments.training import trained
from resode import nets
from resode.errors import RunError
from resode.nets import NetConfig
from resode.runs import Run
from resode.stack import Stack
from resode.train.recipe import Recipe
from resode.train.session import Data


@pytest.fixture(scope="module")
def digits():
    return Data().load(0, "cpu")


def small_net(norm="batch"):
    config = NetConfig(
        net="resnet", depth=8, width=4, channels=1, size=(8, 8), kind="preact", stack=Stack(norm=norm)
    )  # fmt: skip
    return nets.build(config, 0)


RECIPE = Recipe(epochs=2, batch_size=256, lr=0.05)


# Trainings of nets made by hand


def test_a_training_gives_its_records_scores_and_looks(digits, tmp_path):
    def measure(model):
        return {"sum": sum(float(p.detach().sum()) for p in model.parameters())}

    model = small_net()
    before = measure(model)
    found = trained(tmp_path / "run", {"a": 1}, model, digits, RECIPE, measure=measure)
    assert [record["epoch"] for record in found["records"]] == [1, 2]
    assert found["scores"].keys() == {"train", "validation", "test"}
    assert found["scores"]["test"]["count"] == len(digits.test)
    assert (found["before"], found["after"]) == (before, pytest.approx(measure(model)))
    assert found["diverged"] is None
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_finished_training_is_read(digits, tmp_path, monkeypatch):
    first = trained(tmp_path / "run", {"a": 1}, small_net(), digits, RECIPE)
    monkeypatch.setattr("experiments.training.fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert trained(tmp_path / "run", {"a": 1}, small_net(), digits, RECIPE) == first


def test_an_interrupted_training_is_taken_up_and_ends_the_same(digits, tmp_path, monkeypatch):
    import experiments.training as module

    fit, recipe = module.fit, replace(RECIPE, schedule="constant")

    def one_epoch(model, data, recipe, **settings):
        fit(model, data, replace(recipe, epochs=1), **settings)
        raise KeyboardInterrupt

    whole = trained(tmp_path / "whole", {"a": 1}, small_net(), digits, recipe)
    monkeypatch.setattr(module, "fit", one_epoch)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", {"a": 1}, small_net(), digits, recipe, measure=_first_weight)
    monkeypatch.setattr(module, "fit", fit)
    found = trained(tmp_path / "broken", {"a": 1}, small_net(), digits, recipe, measure=_first_weight)
    assert found["scores"] == whole["scores"]
    assert [r["train_loss"] for r in found["records"]] == [r["train_loss"] for r in whole["records"]]
    assert found["before"] == _first_weight(small_net()), "before training, not where it was taken up"


def _first_weight(model):
    return {"weight": float(next(model.parameters()).detach().flatten()[0])}


def test_a_training_that_diverges_is_a_finding_and_is_not_tried_again(digits, tmp_path, monkeypatch):
    recipe = replace(RECIPE, lr=1e12)
    found = trained(tmp_path / "run", {"a": 1}, small_net("none"), digits, recipe, measure=_first_weight)
    assert "became" in found["diverged"]
    assert found["scores"] is None
    assert found["after"] is None
    assert found["before"] == _first_weight(small_net("none"))
    monkeypatch.setattr("experiments.training.fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert trained(tmp_path / "run", {"a": 1}, small_net("none"), digits, recipe) == found


def test_the_folder_of_another_training_is_refused(digits, tmp_path):
    trained(tmp_path / "run", {"a": 1}, small_net(), digits, replace(RECIPE, epochs=1))
    with pytest.raises(RunError, match="a"):
        trained(tmp_path / "run", {"a": 2}, small_net(), digits, replace(RECIPE, epochs=1))


# Stages at initialization


def test_what_was_measured_before_an_interruption_is_read(tmp_path, monkeypatch):
    config = at_init.CONFIGS["smoke"]
    with Run.create(tmp_path / "whole", {}) as out:
        at_init.run(config, out)
        whole = out.result("none-iid-0.5")
    measure, calls = at_init.measure, []

    def few(*arguments, **settings):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure(*arguments, **settings)

    with Run.create(tmp_path / "broken", {}) as out:
        monkeypatch.setattr(at_init, "measure", few)
        with pytest.raises(KeyboardInterrupt):
            at_init.run(config, out)
        monkeypatch.setattr(at_init, "measure", lambda *a, **s: calls.append(a) or measure(*a, **s))
        at_init.run(config, out)
        assert out.result("none-iid-0.5") == whole
    assert len(calls) == len(set(calls)) == 20, "two stages, five depths, two seeds, each measured once"


def test_every_stage_of_the_configurations_makes_sense():
    for config in at_init.CONFIGS.values():
        stages = config.stages()
        assert len(stages) == len(config.norms) * len(config.weights) * len(config.betas) + 1
        assert len(set(stages)) == len(stages)


# Trained stages


def test_trained_nets_begin_with_the_weights_they_are_said_to(digits):
    config = in_training.CONFIGS["smoke"]
    for kind in ("mlp", "preact"):
        for weights, rough in (("tied", 0.0), ("iid", 2**0.5)):
            net = in_training._net(replace(config, kind=kind, width=16), "0.5", weights, 4, 0, digits)
            (found,) = net.stages
            assert [block.scale for block in found] == [0.5] * 4
            W = in_training._weights(net)
            assert float((W[1:] - W[:-1]).norm() / W[1:].norm()) == pytest.approx(rough, abs=0.15)
            assert net(digits.standardize(digits.train.inputs[:3])).shape == (3, 10)


def test_trained_nets_come_from_their_seed_alone(digits):
    nets_of = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(nets_of))
        nets_of.append(in_training._net(in_training.CONFIGS["smoke"], "skipinit", "iid", 3, seed, digits))
    first, again, other = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets_of)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_update_is_what_training_changed(digits):
    net = in_training._net(in_training.CONFIGS["smoke"], "1", "iid", 3, 0, digits)
    look = in_training._Look(net, digits)
    assert look(net)["update"] == {"size": 0.0, "roughness": 0.0, "coherence": 0.0}
    with torch.no_grad():
        for p in net.stages[0].parameters():
            p.add_(0.5)
    count = sum(p.numel() for p in net.stages[0][0].parameters())
    assert look(net)["update"] == pytest.approx(
        {"size": 0.5 * count**0.5, "roughness": 0.0, "coherence": 1.0}, abs=1e-6
    )


# Degradation


def test_a_depth_more_is_told_seed_by_seed(tmp_path):
    config = replace(degradation.CONFIGS["smoke"], nets=("resnet",), epochs=1)
    with Run.create(tmp_path / "run", {}) as out:
        degradation.run(config, out)
        found = out.result("resnet")
    shallow, deep = found["depths"]
    assert [row["depth"] for row in found["depths"]] == [8, 14]
    (rise,) = found["deeper"]
    rises = [
        b["end"]["test_error"] - a["end"]["test_error"] for a, b in zip(shallow["seeds"], deep["seeds"], strict=True)
    ]
    assert rise["rise"]["test_error"]["mean"] == pytest.approx(sum(rises) / 2)
    assert all(len(seed["train_error"]) == len(seed["test_error"]) == 1 for seed in deep["seeds"])


def test_errors_of_every_epoch_are_those_on_the_test_split(tmp_path):
    config = replace(degradation.CONFIGS["smoke"], depths=(8,), nets=("plain",), seeds=(0, 1))
    with Run.create(tmp_path / "run", {}) as out:
        row = degradation._row(config, "plain", 8, out)
    for seed in row["seeds"]:
        assert seed["test_error"][-1] == pytest.approx(seed["end"]["test_error"])


def test_what_diverged_has_no_mean():
    assert degradation._means([{"test_error": 0.1}, None]) is None
    none = {"depth": 8, "seeds": [{"end": None}, {"end": {"test_error": 0.1}}]}
    some = {"depth": 14, "seeds": [{"end": {"test_error": 0.2}}, {"end": {"test_error": 0.1}}]}
    assert degradation._deeper(none, some) == {"from": 8, "to": 14, "rise": None}
