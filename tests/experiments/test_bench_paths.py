"""The benchmark of lesions and spectra: all ways give one answer, at the cost that is said."""

import os
from dataclasses import replace

import pytest
import torch

from experiments import bench_paths
from experiments.bench import lesions, spectra, turns
from experiments.bench.lesions import NAIVE, Subject
from experiments.bench_paths import CONFIGS, Differs, faults, run
from resode import dynamics, inference
from resode.paths import delete, spectrum
from resode.runs import Run


def subject(**settings):
    return Subject(**{"depth": 20, "width": 4, "side": 8, "batch": 3, "seed": 0, "device": "cpu", **settings})


# Lesions


def test_the_naive_way_is_that_of_the_views_and_leaves_the_net_as_it_was():
    one = subject()
    blocks = [list(stage) for stage in one.net.stages]
    found = lesions.by_forward_passes(one.net, one.x)
    assert [list(stage) for stage in one.net.stages] == blocks
    view = dynamics(one.net)
    identities = [0, 1, 2, 4, 5, 7, 8]
    with view.evaluation():
        networks = [delete(i)(view)(one.x) for i in identities]
        torch.testing.assert_close(found, torch.stack([*networks, view(one.x)]))
    assert len({round(float(logits.sum()), 4) for logits in found}) == len(found)


@pytest.mark.parametrize("streams", [1, 3, 100])
def test_forks_give_the_networks_in_the_same_order(streams):
    one = subject()
    expected = lesions.by_forward_passes(one.net, one.x)
    for view in (dynamics(one.net), inference(one.net)):
        assert lesions.largest_distance(lesions.by_forks(view, one.x, streams), expected) < 1e-5
    few = lesions.by_forks(view, one.x, streams, deletions=3)
    assert lesions.largest_distance(few, expected[[0, 3, 6, 7]]) < 1e-5


def test_half_of_the_evaluations_are_needed():
    # 27 blocks, of which 25 have the identity as their shortcut.
    made = {way.name: way.about["evaluations"] for way in lesions.ways(subject(depth=56, batch=1), None)}
    naive = 25 * 26 + 27
    forked = 27 + sum(26 - i for i in range(27) if i not in (9, 18))
    assert made.pop(NAIVE) == naive
    assert set(made.values()) == {forked}


def test_the_distance_is_that_of_the_worst_network():
    reference = torch.ones(3, 2, 2)
    found = reference.clone()
    found[1] *= 1.5
    found[2, 0, 0] += 0.1
    assert lesions.largest_distance(found, reference) == pytest.approx(0.5)


def test_the_net_has_statistics_and_a_subject_sent_elsewhere_makes_the_same():
    one, other = subject(), replace(subject())
    assert float(one.net.stem[2].running_var.std()) > 0
    assert not one.net.training
    assert torch.equal(one.net(one.x), other.net(other.x))
    assert not torch.equal(one.net(one.x), subject(seed=1).net(one.x))


# Spectra


def test_a_path_by_a_forward_and_a_backward_pass_is_one_of_all_paths():
    one = subject(depth=14, batch=2)
    view = dynamics(one.net)

    def loss(logits):
        return logits.square().sum()

    with view.evaluation():
        all_paths = list(spectrum.paths(view, one.x, loss))
    assert len(all_paths) == 2**6
    for choices, expected in all_paths[::5]:
        path = {i for i, through in enumerate(choices) if through}
        found = spectra.path_gradient(view, one.x, loss, path)
        assert spectra.distance(found, expected) < 1e-4
        assert expected.norm() > 0


def test_paths_are_drawn_of_every_length():
    view = dynamics(subject(depth=14).net)
    drawn = list(spectra.draws(view, 8, seed=0))
    assert [len(path) for path in drawn] == [0, *[1] * 6, *[2] * 8, *[3] * 8, *[4] * 8, *[5] * 6, 6]
    assert list(spectra.draws(view, 8, seed=0)) == drawn != list(spectra.draws(view, 8, seed=1))


def test_the_ways_to_a_spectrum_have_the_gradient_as_their_sum():
    answers = [way.answer() for way in spectra.ways(subject(depth=14), samples=2)]
    gradient, *others = [answer for answer in answers if answer is not None]
    assert [spectra.distance(other, gradient) < 1e-4 for other in others] == [True, True]
    assert answers[3:] == [None] * 3


# Turns


def test_everyone_has_a_turn_in_every_round_after_one_that_is_not_measured(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def way(name, cost, answer):
        def call():
            calls.append(name)
            clock[0] += cost
            return answer

        return turns.Way(name, call, {"about": name})

    made = [way("a", 6.0, torch.ones(2)), way("b", 2.0, torch.zeros(2)), way("c", 3.0, None)]
    told = []
    rows = turns.rows(made, lambda found, reference: float((found - reference).norm()), "cpu", 2, 0, told.append)
    assert calls == ["a", "b", "c"] * 3
    assert told == ["a, answers", "b, answers", "c, answers", *["a", "b", "c"] * 2]
    assert [row["about"] for row in rows] == ["a", "b", "c"]
    assert [row.get("distance") for row in rows] == [0.0, pytest.approx(2**0.5), None]
    assert [row["rounds"] for row in rows] == [[6.0, 6.0], [2.0, 2.0], [3.0, 3.0]]
    turns.relate(rows, "a", "to_a")
    assert [row["to_a"]["ratio"] for row in rows] == [1.0, 3.0, 2.0]
    turns.rows(made[2:], None, "cpu", 1, 2, told.append)
    assert calls == ["a", "b", "c"] * 3 + ["c"] * 4  # with two to lead in


# The whole


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A smoke run, but for the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_paths, "memory", lambda *_: [])
        with Run.create(tmp_path_factory.mktemp("bench") / "run", {}) as folder:
            run(CONFIGS["smoke"], folder)
            folder.finish()
    return folder


def test_the_rows_say_what_was_measured(results):
    found = results.result("bench")
    for question, ways in (("lesions", 4), ("spectrum", 6)):
        rows = found[question]["rows"]
        assert len(rows) == ways
        assert all(row["seconds"]["n"] == 1 and row["seconds"]["median"] > 0 for row in rows)
        assert rows[0]["distance"] == 0.0
    assert [row["arithmetic"] for row in found["lesions"]["rows"]][:3] == [
        torch.backends.cpu.get_cpu_capability().lower()
    ] * 3
    assert not list(faults(found))
    said = (results.path / "table.md").read_text()
    assert all(f"| {row['way']} |" in said for row in found["lesions"]["rows"] + found["spectrum"]["rows"])


def test_memory_does_not_grow_with_the_deletions():
    variables = dict(os.environ)
    config = replace(CONFIGS["smoke"], depth=32, batch=16, side=32, width=16)
    few, many = bench_paths.memory(config, config.subject(config.depth, config.batch), 1, lambda name: None)
    assert (few["deletions"], many["deletions"]) == (1, 13)
    assert few["streams"] == many["streams"] == 1
    state = 16 * 16 * 32 * 32 * 4 / 2**20
    assert few["peak_mib"] > state
    assert many["peak_mib"] < few["peak_mib"] + state  # one state kept for each deletion would be 12
    assert dict(os.environ) == variables


def test_another_answer_is_an_error_with_the_results_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_paths, "memory", lambda *_: [])
    monkeypatch.setattr(lesions, "inference", lambda net, dtype=None: dynamics(subject(depth=14, seed=7).net))
    with (
        Run.create(tmp_path / "run", {}) as folder,
        pytest.raises(Differs, match="lesions, forked, folded, channels-last: its answer is off by"),
    ):
        run(CONFIGS["smoke"], folder)
    found = folder.result("bench")
    assert len(list(faults(found))) == 2
    found["lesions"]["rows"][1]["distance"] = float("nan")
    assert len(list(faults(found))) == 3
