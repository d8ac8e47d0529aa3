"""The benchmark's parts that need no clock: what is compared is the same, ratios are of medians, no worker is lost."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from experiments.bench import peers, rounds, station, summary, work, workers
from experiments.bench.work import LAYOUTS, OURS, PEERS, SAME, WRITTEN, Problem, Work
from experiments.bench_ode import CONFIGS, cases, run
from paper_figs.bench_ode import figure
from paper_figs.common import provenance
from resode.blocks import Branch
from resode.runs import Run
from resode.stack import Stack

COMMON = {"batch": 2, "seed": 0, "device": "cpu"}
EULER = Problem(solver="euler", steps=3, channels=4, side=6)


def euler(peer=OURS, **changes):
    """A small piece of work."""
    given = {"table": WRITTEN, "case": "c", "peer": peer, "label": peer, "problem": EULER, **COMMON}
    return Work(**(given | changes))


# --- the same work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_concatenating_equals_the_branch_in_outputs_and_gradients(norm, layout):
    torch.manual_seed(0)
    branch = Branch(6, Stack(norm=norm), "basic", "concat").double()
    other = peers.Concatenating(branch).double()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    found = []
    for f in (branch, other):
        f.zero_grad()
        h = x.clone().requires_grad_()
        out = f(torch.tensor(0.3, dtype=torch.float64), h)
        out.square().sum().backward()
        found.append([out, h.grad, *(g.clone() for g in peers.gradients(f))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_concatenating_takes_a_time_for_each_sample():
    torch.manual_seed(0)
    f = peers.Concatenating(Branch(4, Stack(norm="group"), "basic", "concat"))
    t, h = torch.rand(3), torch.randn(3, 4, 5, 5)
    one_by_one = torch.cat([f(t[i], h[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(f(t[:, None, None, None], h), one_by_one)


def test_concatenating_holds_no_parameter_that_it_does_not_use():
    f = peers.Concatenating(Branch(4, Stack(norm="group"), "basic", "concat"))
    f(0.5, torch.randn(2, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in f.parameters())


def test_every_worker_makes_the_same_weights():
    mine, theirs = (peers.field(euler(peer)) for peer in (OURS, "torchdiffeq"))
    assert isinstance(mine, Branch)
    assert isinstance(theirs, peers.Concatenating)
    torch.testing.assert_close(peers.Concatenating(mine).state_dict(), theirs.state_dict())
    assert isinstance(peers.field(euler(OURS, table=SAME)), peers.Concatenating)


def test_the_floor_is_as_many_convolutions_as_the_evaluations_have(monkeypatch):
    branch = Branch(4, Stack(norm="group"), "basic", "concat")
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in branch.layers) == peers.CONVOLUTIONS
    calls, conv2d = [], peers.F.conv2d
    monkeypatch.setattr(peers.F, "conv2d", lambda *args, **kw: calls.append(args[0].shape) or conv2d(*args, **kw))
    floor = cases(replace(CONFIGS["smoke"], written=()), PEERS)[0].floor
    assert [one.layout for one in floor] == list(LAYOUTS)
    for one in floor:
        bench = station.Bench(one.chain(5))
        calls.clear()
        bench.once(bench.start())
        assert calls == [bench.x.shape] * (5 * peers.CONVOLUTIONS)
        assert all(w.grad is not None for w in bench.f.weights)


def test_a_long_floor_neither_overflows_nor_vanishes():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 4, 4)
    grown = peers.Convolutions(8, 150)(x).norm() / x.norm()
    assert 1e-3 < grown < 1e3


def test_layouts_are_what_they_are_called():
    assert station.Bench(euler(layout="contiguous")).x.is_contiguous()
    assert station.Bench(euler(layout="channels-last")).x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_peer_has_our_gradient_and_our_number_of_evaluations(peer, layout):
    pytest.importorskip(peers.IMPORTED[peer])
    benches = [station.Bench(euler(who, layout=layout)) for who in (OURS, peer)]
    mine, theirs = (bench.gradient() for bench in benches)
    assert rounds.difference(theirs, mine) < 1e-5
    mine, theirs = (bench.counted() for bench in benches)
    assert mine["nfe_forward"] == theirs["nfe_forward"] == 3
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_torchdiffeqs_rk4_is_compared_with_the_three_eighths_rule():
    problem = replace(EULER, solver="rk4")
    mine, theirs = (station.Bench(euler(who, problem=problem)) for who in (OURS, "torchdiffeq"))
    assert mine.work.twin == "rk4-38"
    assert theirs.work.twin == "rk4"
    assert rounds.difference(mine.gradient(), theirs.gradient()) < 1e-5
    assert mine.solve.solver == "rk4"


def test_torchdyns_rk4_is_timed_but_excluded_from_parity():
    problem = replace(EULER, solver="rk4")
    case = work.compared(SAME, problem, COMMON, PEERS, LAYOUTS)
    there = {one.peer: one for one in case.works}
    assert set(there) == {OURS, "torchdiffeq", "torchdyn"}
    assert there["torchdyn"].timed
    assert there["torchdyn"].parity.startswith("excluded")
    assert there[OURS].parity == there["torchdiffeq"].parity == "exact"


# --- ratios ----------------------------------------------------------------------------------------------------------


def row(label, layout, seconds, nfe=4, **more):
    peer = label.partition(",")[0]
    given = {"table": WRITTEN, "case": "c", "label": label, "peer": peer, "layout": layout, "subject": peer == OURS}
    given |= {"seconds": summary.spread(seconds), "rounds": seconds, "batch": 2, "device": "cpu", "arithmetic": "x"}
    return given | ({"evaluations": nfe} if peer == "floor" else {"nfe_forward": nfe}) | more


def rows():
    return [
        row(OURS, "contiguous", [4.0, 4.0, 4.0]),
        row(OURS, "channels-last", [1.0, 2.0, 3.0]),
        row("torchdiffeq", "contiguous", [6.0, 6.0, 9.0], nfe=8),
        row("torchdiffeq", "channels-last", [5.0, 4.0, 3.0], nfe=8),
        row("floor", "contiguous", [1.0, 1.0, 1.0]),
        row("floor", "channels-last", [0.5, 0.5, 2.0]),
    ]


def test_a_ratio_is_of_medians_and_its_spread_over_the_rounds():
    found = summary.ratio(row("torchdiffeq", "contiguous", [6.0, 6.0, 9.0]), row(OURS, "contiguous", [1.0, 2.0, 3.0]))
    assert found == {"ratio": 3.0, "min": 3.0, "max": 6.0, "n": 3}


def test_ratios_are_by_default_and_by_best_layout_and_per_evaluation():
    default, best = summary.summarize(rows())[WRITTEN]["c"]["ratios"]
    assert (default["way"], default["ours_layout"], default["other_layout"]) == (
        "default",
        "channels-last",
        "contiguous",
    )
    assert default["ratio"] == 6.0 / 2.0
    assert (best["way"], best["ours_layout"], best["other_layout"]) == ("best", "channels-last", "channels-last")
    assert best["ratio"] == 4.0 / 2.0
    assert best["per_evaluation"] == best["ratio"] * 4 / 8


def test_the_floor_is_the_faster_layout_at_each_ones_number_of_evaluations():
    found = rows()
    summary.relate(found)
    by = {(one["label"], one["layout"]): one for one in found}
    assert by[OURS, "channels-last"]["to_floor"] == 2.0 / 0.5
    assert by["torchdiffeq", "contiguous"]["to_floor"] == 6.0 / (0.5 * 2)
    assert by[OURS, "channels-last"]["to_torchdiffeq"] == 2.0 / 6.0
    assert "to_floor" not in by["floor", "contiguous"]


def test_the_table_says_who_is_missing_and_which_layout_is_which():
    found = rows()
    summary.relate(found)
    said = summary.table(found, summary.summarize(found), {"torchode": "not installed"})
    assert "torchode: skipped, not installed" in said
    assert "ours channels-last, theirs contiguous" in said
    assert "| as written | c | torchdiffeq | resode | 3.00 (3.00–6.00) | 2.00 (1.00–5.00) | 1.00 |" in said


def test_faults_are_ours_that_failed_other_gradients_and_other_evaluations():
    good = {"parity": "exact", "gradient_difference": 1e-6, "steps": 2}
    fine = [row(OURS, "contiguous", [1.0], **good), row("torchdiffeq", "contiguous", [1.0], **good)]
    assert rounds.faults(fine) == []
    theirs = row("torchode", "contiguous", [1.0], **good) | {"error": "no such method"}
    assert rounds.faults([*fine, theirs]) == []
    assert "no such" in rounds.faults([row(OURS, "contiguous", [1.0], **good) | {"error": "no such option"}])[0]
    for off in (0.01, float("nan")):
        assert (
            "off by"
            in rounds.faults([*fine, row("torchdyn", "contiguous", [1.0], **good | {"gradient_difference": off})])[0]
        )
    assert "9 evaluations" in rounds.faults([*fine, row("torchdyn", "contiguous", [1.0], nfe=9, **good)])[0]


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_case_is_in_both_layouts_and_has_something_of_ours_to_compare_with(name):
    found = cases(CONFIGS[name], PEERS)
    assert len({(case.table, case.name) for case in found}) == len(found)
    for case in found:
        assert any(one.subject and one.timed for one in case.works)
        assert {one.layout for one in case.works} == set(LAYOUTS) or all(one.peer == OURS for one in case.works)


def test_reversible_is_timed_at_equal_evaluations_and_measured_at_few_and_many_steps():
    case = work.reversible(replace(EULER, solver="rk4", steps=8), COMMON, few=8, many=64)
    timed = {one.gradient: one.problem.steps for one in case.works if one.timed}
    assert timed == {"reversible": 4, "backprop": 8}
    assert {(one.gradient, one.problem.steps) for one in case.works if one.memory} == {
        (gradient, steps) for gradient in ("reversible", "backprop") for steps in (8, 64)
    }


def peak_of_backpropagation(steps):
    """Peak memory of a solve of that many steps, in MiB."""
    problem = replace(EULER, channels=16, side=32, steps=steps)
    return station.Station().memory(euler(problem=problem, batch=16))["peak_mib"]


def test_memory_grows_with_the_steps_of_backpropagation():
    # Each in a process of its own: one that has run other tests holds memory that it can use again.
    peaks = []
    for steps in (2, 16):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peaks.append(pool.submit(peak_of_backpropagation, steps).result())
    assert 0 < peaks[0] < peaks[1]


def test_the_arithmetic_of_bf16_is_that_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for flags, expected in (
        ({"amx_bf16", "avx512_bf16"}, "amx_bf16"),
        ({"avx512_bf16"}, "avx512_bf16"),
        (set(), "avx512, no bf16"),
    ):
        monkeypatch.setattr(station, "_cpu_flags", lambda flags=flags: flags)
        assert station.arithmetic("cpu", "bf16") == expected
        assert station.arithmetic("cpu", "float32") == "avx512"


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke run where torchode is not installed, and torchdyn not wanted."""
    config = replace(CONFIGS["smoke"], peers=("torchdiffeq", "torchode"), same=CONFIGS["smoke"].same[:1])
    real = workers.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "find_spec", lambda name: None if name == "torchode" else real(name))
        with Run.create(tmp_path_factory.mktemp("bench") / "run", asdict(config)) as folder:
            run(config, folder)
            folder.finish()
    return folder


def test_a_smoke_run_has_rows_for_both_with_the_same_gradient(smoke):
    found = smoke.result("bench")
    for case in cases(CONFIGS["smoke"], ["torchdiffeq"]):
        there = [one for one in found["rows"] if (one["table"], one["case"]) == (case.table, case.name)]
        assert {one["peer"] for one in there} == {OURS, "torchdiffeq", "floor"}
        assert {one["layout"] for one in there} == set(LAYOUTS)
        for one in there:
            assert set(one["seconds"]) == {"median", "min", "max", "n"}
            assert one["seconds"]["n"] == 1
            if one["peer"] != "floor":
                assert one["nfe_forward"] > 0
                assert one["to_floor"] > 0
                assert one["gradient_difference"] <= (1e-4 if one["steps"] else 0.1)
        assert found["summary"][case.table][case.name]["ratios"]


def test_a_smoke_run_says_which_peers_are_missing(smoke):
    found = smoke.result("bench")
    assert found["absent"] == {"torchode": "not installed"}
    assert found["peers"]["torchode"] is None
    assert found["peers"]["torchdiffeq"]
    assert "torchode: skipped, not installed" in (smoke.path / "table.md").read_text()


def test_a_figure_is_drawn_from_a_smoke_run(smoke):
    environment = {"git": None, "device": {"name": "cpu"}, "versions": {"torch": "2"}, "time": "2026-01-01"}
    published = {
        "experiment": "bench_ode",
        "configuration": "smoke",
        "environment": environment,
        "results": {"bench": smoke.result("bench")},
    }
    drawn = figure(published)
    assert len(drawn.axes) == 3
    assert all(axes.has_data() for axes in drawn.axes)
    assert drawn.get_supxlabel() == provenance(published)


class Incomplete:
    """A worker that cannot import torchdyn."""

    def __init__(self, peer):
        self.peer, self.connection = peer, self

    def ready(self):
        if self.peer == "torchdyn":
            raise workers.Absent("No module named 'attr'")
        return "1.0"

    def close(self, patience=0.0):
        pass


def test_a_peer_that_lacks_something_is_absent_and_says_what(monkeypatch):
    monkeypatch.setattr(workers, "Worker", Incomplete)
    monkeypatch.setattr(workers, "find_spec", lambda name: None if name == "torchode" else object())
    with workers.Crew(PEERS) as crew:
        assert crew.absent == {"torchode": "not installed", "torchdyn": "cannot be imported: No module named 'attr'"}
        assert crew.versions == {OURS: "1.0", "floor": "1.0", "torchdiffeq": "1.0"}
        assert "torchdyn" not in crew


def test_a_worker_that_refuses_goes_on_and_one_that_dies_says_so():
    worker = workers.Worker(OURS)
    try:
        worker.ready()
        with pytest.raises(workers.Refused, match="InvalidInput: unknown solver"):
            worker.ask("prepare", euler(problem=replace(EULER, solver="no such")), 0)
        found = worker.ask("prepare", euler(), 0)
        assert np.isfinite(found["gradient"]).all()
        assert worker.ask("repeat", found["bench"], 0) > 0
        os.kill(worker.process.pid, signal.SIGINT)  # Ctrl-C is the parent's to answer
        assert worker.ask("repeat", found["bench"], 1) > 0
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(workers.WorkerError, match=r"worker of resode was killed by SIGKILL.*repeat the euler"):
            worker.ask("repeat", found["bench"], 0, about="the euler")
    finally:
        worker.close()


def test_no_worker_outlives_an_interruption():
    crew = workers.Crew([])
    processes = [worker.process for worker in crew]
    assert [process.is_alive() for process in processes] == [True, True]
    with pytest.raises(KeyboardInterrupt), crew:
        raise KeyboardInterrupt
    assert [process.is_alive() for process in processes] == [False, False]
