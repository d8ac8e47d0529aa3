"""Gradient fidelity in a session: what is measured, what is warned of, and that nothing is disturbed."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resode import Dropout, NetConfig, ODEBlock, Recipe, SolverError, Stack, build, gradient_fidelity
from resode.blocks import FIDELITY_TOLERANCE
from resode.nets import Architecture
from resode.train import Data, Setup, fidelity, train
from resode.train.fidelity import measure, warning

BLOCKS = ["stages.0.0", "stages.1.1", "stages.2.1"]


def net(gradient="adjoint", seed=0, stack=None, **settings):
    config = {"net": "odenet", "kind": "preact", "width": 4, "channels": 1, "size": (8, 8), "classes": 3}
    return build(NetConfig(gradient=gradient, stack=stack or Stack(), **{**config, **settings}), seed)


def batch(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3


# What is measured


def test_every_block_with_an_adjoint_is_measured_and_no_other():
    model = net(solver="euler", steps=2)
    assert list(measure(model, *batch())) == BLOCKS
    model.stages[1][1].gradient = "backprop"
    assert list(measure(model, *batch())) == [BLOCKS[0], BLOCKS[2]]
    for gradient in ("backprop", "checkpoint", "reversible"):
        assert measure(net(gradient, steps=1), *batch()) == {}
    assert measure(nn.Linear(3, 2), torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)) == {}


def test_a_block_is_measured_at_its_input_and_cotangent_in_training():
    """As found by hand, where nothing is drawn and norms have no statistics."""
    model, (x, labels) = net(solver="euler", steps=3, stack=Stack(norm="group")), batch()
    met, cotangents = {}, {}
    for name in BLOCKS:
        block = model.get_submodule(name)
        block.gradient = "backprop"

        def watch(module, inputs, out, name=name):
            met[name] = inputs[0].detach()
            out.register_hook(lambda g: cotangents.update({name: g}))

        block.register_forward_hook(watch)
    F.cross_entropy(model(x), labels).backward()
    for name, found in measure(net(solver="euler", steps=3, stack=Stack(norm="group")), x, labels).items():
        block = net(solver="euler", steps=3, stack=Stack(norm="group")).get_submodule(name)
        expected = gradient_fidelity(block, met[name], cotangents[name])
        assert (found["parameter"], found["relative_error"]) == (
            expected.worst[0],
            pytest.approx(expected.worst[1], rel=1e-3),
        )
        assert found["reconstruction_error"] == pytest.approx(expected.reconstruction_error, rel=1e-3)
        assert found["relative_error"] > 0.01


def test_finer_grids_are_nearer():
    errors = [
        max(one["relative_error"] for one in measure(net(steps=n, stack=Stack(activation="tanh")), *batch()).values())
        for n in (1, 16)
    ]
    assert errors[1] < 0.05 * errors[0]


def test_model_and_random_state_are_left_as_they_were_and_the_masks_are_always_the_same():
    model = net(solver="bosh3", stack=Stack(dropout=Dropout(p=0.3)), steer=0.2, compile=True).eval()
    before, settings = copy.deepcopy(model.state_dict()), [dict(vars(b)) for b in blocks_of(model)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = measure(model, *batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [dict(vars(b)) for b in blocks_of(model)] == settings
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    torch.manual_seed(4)
    assert measure(model, *batch()) == found


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, ODEBlock)]


@pytest.mark.parametrize("error", [SolverError("the step size underflows"), torch.OutOfMemoryError("no room")])
def test_what_cannot_be_measured_is_said_and_stops_no_training(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(fidelity, "gradient_fidelity", fails)
    found = measure(net(steps=1), *batch())
    assert {one["failure"] for one in found.values()} == {str(error)}
    assert str(error) in warning(found, "the net")


# What is warned of


def one(error, back=0.02):
    return {"parameter": "branch.weight", "relative_error": error, "reconstruction_error": back}


def test_a_warning_names_the_worst_block_its_error_and_what_to_do():
    said = warning({"stages.0.0": one(0.005), "stages.1.1": one(0.25), "stages.2.1": one(0.02)}, "the trained net")
    for words in ("the trained net", "25.0%", "stages.1.1", "branch.weight", "1% is", "2.0%", "gradient=checkpoint"):
        assert words in said
    assert "\n" not in said


def test_up_to_the_tolerance_nothing_is_said():
    assert warning({}, "the net") is None
    assert warning({"a": one(FIDELITY_TOLERANCE), "b": one(0.0)}, "the net") is None
    assert warning({"a": one(1.01 * FIDELITY_TOLERANCE)}, "the net") is not None


def test_an_error_that_is_no_number_is_the_worst():
    said = warning(json.loads(json.dumps({"a": one(0.5), "b": one(None, None)})), "the net")
    assert "block b" in said
    assert "inf" in said


# In a session

POINTS = Setup(
    architecture=Architecture(net="odenet", kind="mlp", solver="euler", steps=2, gradient="adjoint"),
    data=Data(data="moons"),
    recipe=Recipe(epochs=1, batch_size=400, lr=0.05),
)


def test_a_training_keeps_the_fidelity_of_its_start_and_its_end(tmp_path, capsys):
    run = train(POINTS, tmp_path / "run", progress=True)
    held = run.result("train")["gradient_fidelity"]
    assert set(held) == {"start", "end"}
    for found in held.values():
        assert set(found) == {"stages.0.0"}
        assert found["stages.0.0"]["relative_error"] > FIDELITY_TOLERANCE
        assert found["stages.0.0"]["reconstruction_error"] > 0
    assert held["start"] != held["end"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: The adjoint gradient of the net before training is off by ")


def test_a_fine_solve_gives_no_warning_and_another_mode_no_measurement(tmp_path, capsys):
    fine = replace(POINTS, architecture=replace(POINTS.architecture, solver="rk4", steps=16))
    assert "gradient_fidelity" in train(fine, tmp_path / "fine", progress=True).result("train")
    exact = replace(POINTS, architecture=replace(POINTS.architecture, gradient="checkpoint"))
    assert "gradient_fidelity" not in train(exact, tmp_path / "exact", progress=True).result("train")
    assert capsys.readouterr().err == ""


def test_the_measurement_changes_no_number_of_the_training(tmp_path, monkeypatch):
    setup = replace(POINTS, stack=Stack(dropout=Dropout(p=0.2)))
    measured = train(setup, tmp_path / "one").metrics()
    monkeypatch.setattr(fidelity, "measure", lambda *_: {})
    bare = train(setup, tmp_path / "two").metrics()
    assert measured[0]["train_loss"] == bare[0]["train_loss"]
    assert measured[0]["validation_loss"] == bare[0]["validation_loss"]


def test_an_error_that_is_no_number_is_the_worst_wherever_it_stands():
    well = {"parameter": "w", "relative_error": 1e-4, "reconstruction_error": 1e-6}
    for bad in (float("nan"), None):
        lost = {"parameter": "v", "relative_error": bad, "reconstruction_error": bad}
        assert "v in block b" in warning({"a": well, "b": lost}, "the net")
        assert "v in block b" in warning({"b": lost, "a": well}, "the net")
