"""The study of the depth limit: its controls match the ODE nets, and an interrupted run takes up its work."""

from dataclasses import replace

import pytest
import torch

from experiments import depth_limit
from experiments.depth_limit import CONFIGS, FLOW, NOTHING, TIED, UNTIED, Subject, build
from resode import ODEBlock
from resode.blocks import ResidualBlock
from resode.nets import NetConfig
from resode.nets.net import parameter_count
from resode.runs import Run
from resode.stack import Stack
from resode.train.metrics import nfe

SMOKE = CONFIGS["smoke"]


def settings(norm="group", time="concat", steps=4, solver="euler"):
    return NetConfig(
        net="odenet",
        kind="preact",
        width=4,
        channels=1,
        size=(8, 8),
        time=time,
        stack=Stack(norm=norm),
        solver=solver,
        steps=steps,
    )  # fmt: skip


def in_place(net):
    """What stands in each stage after the block that changes the shape, if there is one."""
    return [
        [block for block in stage if isinstance(getattr(block, "shortcut", None), torch.nn.Identity)]
        for stage in net.stages
    ]


# Controls


def test_controls_have_the_steps_parameters_and_evaluations_of_their_net():
    flow = Subject(FLOW, 3, "rk4")
    assert flow.controls == {
        "no block": Subject(NOTHING),
        "one block": Subject(UNTIED, 1),
        "equal parameters": Subject(TIED, 3),
        "equal evaluations": Subject(UNTIED, 12),
    }


@pytest.mark.parametrize("subject", [Subject(NOTHING), Subject(UNTIED, 3), Subject(TIED, 3)])
def test_a_control_differs_from_the_ode_net_in_what_stands_for_its_blocks_alone(subject):
    flow, control = build(Subject(FLOW, 4), settings(), 1), build(subject, settings(), 1)
    ours, theirs = control.state_dict(), flow.state_dict()
    branches = [name for name, module in flow.named_modules() if isinstance(module, ODEBlock)]
    assert len(branches) == 3
    shared = [name for name in theirs if not name.startswith(tuple(branches))]
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert [len(blocks) for blocks in in_place(control)] == [subject.count] * 3
    own = {"nothing": 0, "tied": 1, "untied": 3}[subject.what]
    field = sum(
        parameter_count(m)
        for m in build(Subject(FLOW, 4), settings(time=_time(subject)), 1).modules()
        if isinstance(m, ODEBlock)
    )
    rest = sum(theirs[name].numel() for name in shared)
    assert parameter_count(control) == rest + own * field


def _time(subject):
    return "none" if subject.what == UNTIED else "concat"


def test_equal_parameters_are_equal():
    assert parameter_count(build(Subject(TIED, 5), settings(), 0)) == parameter_count(
        build(Subject(FLOW, 5), settings(), 0)
    )


def test_tied_blocks_are_one_branch_at_the_times_of_the_steps():
    net, flow = build(Subject(TIED, 4), settings(), 2), build(Subject(FLOW, 4), settings(), 2)
    for blocks, stage in zip(in_place(net), flow.stages, strict=True):
        (ode,) = (m for m in stage if isinstance(m, ODEBlock))
        assert len({id(block.branch) for block in blocks}) == 1
        assert [block.t for block in blocks] == [0.0, 0.25, 0.5, 0.75]
        assert [block.scale for block in blocks] == [1.0] * 4
        ours, theirs = blocks[0].branch.state_dict(), ode.branch.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_untied_blocks_have_draws_of_their_own():
    blocks = in_place(build(Subject(UNTIED, 3), settings(), 0))[1]
    weights = [next(p for p in block.branch.parameters() if p.ndim == 4) for block in blocks]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    again = in_place(build(Subject(UNTIED, 3), settings(), 0))[1]
    assert all(
        torch.equal(a, next(p for p in b.branch.parameters() if p.ndim == 4))
        for a, b in zip(weights, again, strict=True)
    )


@pytest.mark.parametrize("subject", [Subject(FLOW, 3, "rk4"), Subject(UNTIED, 5), Subject(TIED, 2), Subject(NOTHING)])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_evaluations_are_those_of_a_forward_pass(subject, norm):
    config = settings(norm=norm, solver=subject.solver, steps=max(1, subject.count))
    net = build(subject, config, 0)
    net(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    transitions = sum(
        isinstance(m, ResidualBlock) and not isinstance(m.shortcut, torch.nn.Identity) for m in net.modules()
    )
    assert transitions == 2
    assert depth_limit._evaluations(subject, config) == nfe(net) - transitions


def test_every_net_of_the_configurations_is_named_once():
    for config in CONFIGS.values():
        subjects = config.subjects()
        assert len({subject.name for subject in subjects}) == len(subjects)
        assert set(config.flows()) <= set(subjects)


# The study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with Run.create(tmp_path_factory.mktemp("depth") / "whole", {}) as out:
        depth_limit.run(SMOKE, out)
        yield {subject.name: out.result(subject.name) for subject in SMOKE.subjects()} | {
            "matched": out.result("matched")
        }


def test_gains_are_seed_by_seed(whole):
    for name, row in whole["matched"].items():
        for control in row["controls"].values():
            gains = [
                a["accuracy"] - b["accuracy"]
                for a, b in zip(whole[name]["seeds"], whole[control["net"]]["seeds"], strict=True)
            ]
            assert control["gain"]["mean"] == pytest.approx(sum(gains) / len(gains))
            assert control["gain"]["count"] == len(SMOKE.seeds)
        assert row["controls"]["equal parameters"]["parameters"] == row["parameters"]
        assert row["controls"]["equal evaluations"]["evaluations"] == row["evaluations"]


def test_certificates_are_of_the_trained_nets(whole):
    for name, result in whole.items():
        if name in ("matched", "nothing"):
            continue
        for seed in result["seeds"]:
            initial = next(one for one in seed["initial"] if one["factor"] == 1.0)
            found = next(one for one in seed["certificate"]["swaps"] if one["factor"] == 1.0)
            assert found["solver"] == initial["solver"] == "as trained"
            assert found["nfe"] == initial["nfe"] == result["evaluations"]
            assert found["error"] != initial["error"]
            # 64 of the 1000 samples, evenly spaced: the accuracy on all is near that on these.
            assert found["accuracy"] == pytest.approx(seed["accuracy"], abs=0.25)


def test_an_interrupted_study_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    certificate, calls = depth_limit.certificate, []

    def few(*arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return certificate(*arguments, **options)

    with Run.create(tmp_path / "broken", {}) as out:
        monkeypatch.setattr(depth_limit, "certificate", few)
        with pytest.raises(KeyboardInterrupt):
            depth_limit.run(SMOKE, out)
        monkeypatch.setattr(depth_limit, "certificate", lambda *a, **o: calls.append(a) or certificate(*a, **o))
        depth_limit.run(SMOKE, out)
        for subject in SMOKE.subjects():
            assert out.result(subject.name) == whole[subject.name]
    certified = [subject for subject in SMOKE.subjects() if subject.what != NOTHING]
    assert len(calls) == len(certified) * len(SMOKE.seeds), "each once"


def test_a_net_that_diverges_has_no_certificate_and_no_interval(tmp_path):
    config = replace(SMOKE, trained=(("euler", 2),), lr=1e12, clip=None)
    with Run.create(tmp_path / "run", {}) as out:
        found = depth_limit._result(config, Subject(FLOW, 2), out)
    assert found["accuracy"] is None
    assert all(seed["diverged"] and seed["certificate"] is None for seed in found["seeds"])
    matched = depth_limit._matched(
        Subject(FLOW, 2), dict.fromkeys((Subject(FLOW, 2), *Subject(FLOW, 2).controls.values()), found)
    )
    assert matched["verdicts"] == [None, None]
    assert all(control["gain"] is None for control in matched["controls"].values())
