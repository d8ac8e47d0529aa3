"""The comparison with airbench94: the data it is given, what its table says, and who is first at its accuracy."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experiments import bench_airbench
from experiments.bench import airbench
from experiments.bench_airbench import AIRBENCH, Config, Entry
from resode import InvalidInput
from resode.data import load
from resode.runs import Run
from resode.train.loop import fit

HEAD = "|  run     |  epoch  |  train_loss  |  train_acc  |  val_acc  |  tta_val_acc  |  total_time_seconds  |"
EPOCH = "|       0  |      9  |      1.0023  |     0.9521  |   0.9321  |               |              2.4011  |"
LAST = "|          |   eval  |      1.0023  |     0.9521  |   0.9321  |       0.9402  |              2.5133  |"


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0, validation=0.0)


@pytest.fixture
def stub(monkeypatch):
    """airbench as its driver sees it: it draws from torch's generator, and reads the files of the working directory."""
    module, calls = ModuleType("airbench"), []

    def train94(verbose):
        calls.append((torch.rand(()).item(), torch.backends.cudnn.benchmark, torch.load("cifar10/train.pt")))
        print("-" * 9, HEAD, "-" * 9, EPOCH, LAST, "-" * 9, sep="\n")

    module.train94, module.warmup94 = train94, lambda: print(EPOCH)
    monkeypatch.setitem(sys.modules, "airbench", module)
    return calls


def test_the_last_row_of_its_table_is_the_outcome():
    assert airbench.outcome("\n".join([HEAD, EPOCH, LAST, "-" * 9])) == airbench.Outcome(0.9402, 2.5133)
    for other in ("", EPOCH, LAST.replace("0.9402", "      "), LAST.rsplit("|", 2)[0]):
        with pytest.raises(airbench.Unreadable, match=r"install airbench==0\.1\.8"):
            airbench.outcome(other)


def test_it_is_given_our_images_and_draws_from_the_seed_and_leaves_nothing_changed(digits, stub, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    place, state = Path.cwd(), torch.get_rng_state()
    with airbench.ready(digits):
        there = Path.cwd()
        saved = torch.load("cifar10/test.pt")
        found = [airbench.train(seed, torch.device("cpu")) for seed in (0, 0, 1)]
        assert airbench.train(0, torch.device("cpu"), warmup=True) is None
    assert found == [airbench.Outcome(0.9402, 2.5133)] * 3
    (one, trial, data), (again, _, _), (another, _, _) = stub
    assert one == again != another
    assert trial
    assert torch.equal(data["images"].permute(0, 3, 1, 2), digits.train.inputs)
    assert torch.equal(saved["images"].permute(0, 3, 1, 2), digits.test.inputs)
    assert torch.equal(saved["labels"], digits.test.labels)
    assert not torch.backends.cudnn.benchmark
    assert Path.cwd() == place
    assert not there.exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_it_says_why_it_takes_no_part(digits, monkeypatch):
    monkeypatch.setattr(airbench, "find_spec", lambda _: None)
    assert "pip install airbench" in airbench.absent(digits)
    monkeypatch.setattr(airbench, "find_spec", lambda _: object())
    assert "CUDA" in airbench.absent(digits)


def row(accuracies, seconds):
    turns = zip(accuracies, seconds, strict=True)
    return bench_airbench.row([{"accuracy": a, "seconds": s, "parameters": 1} for a, s in turns])


def test_the_first_at_its_accuracy_is_the_quickest_of_those_that_reach_its_mean():
    rows = {
        "quick": row([0.92, 0.94], [1.0, 1.0]),
        "slow": row([0.95, 0.95], [9.0, 9.0]),
        "enough": row([0.93, 0.95], [4.0, 6.0]),
        AIRBENCH: row([0.939, 0.941], [2.0, 2.0]),
    }
    found = bench_airbench.to_accuracy(rows)
    assert found["first"] == "enough"
    assert found["accuracy"] == pytest.approx(0.94)
    assert found["ratio"] == {"ratio": 2.5, "min": 2.0, "max": 3.0, "n": 2}
    assert "enough, in 2.50 times" in bench_airbench.table(rows)
    none = bench_airbench.to_accuracy({name: rows[name] for name in ("quick", AIRBENCH)})
    assert (none["first"], none["ratio"]) == (None, None)
    assert bench_airbench.to_accuracy({"slow": rows["slow"]}) is None


def test_entries_are_the_preset_of_another_size_at_a_rate_in_proportion_to_the_batch():
    entry = Entry(width=64, epochs=8, batch_size=512)
    recipe = Config(entries=(entry,)).setup(entry, 3).recipe
    assert (recipe.epochs, recipe.batch_size, recipe.seed) == (8, 512, 3)
    assert recipe.lr == pytest.approx(4 * 0.2)
    assert recipe.warmup / recipe.epochs == pytest.approx(4 / 16)
    for settings in ({"entries": ()}, {"seeds": ()}, {"entries": (entry, replace(entry, batch_size=8))}):
        with pytest.raises(InvalidInput):
            Config(**settings)
    with pytest.raises(InvalidInput, match="width"):
        Entry(width=0, epochs=1)


def test_an_interrupted_benchmark_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    config = Config(entries=(Entry(width=4, epochs=1, batch_size=512),), data="digits", seeds=(0, 1, 2))
    trained = []

    def once(model, data, recipe, **settings):
        trained.append((recipe.seed, len(data.train)))
        if trained[-1] == (2, 1438):
            raise KeyboardInterrupt
        return fit(model, data.__class__(**{**vars(data), "train": data.train.take(slice(64))}), recipe, **settings)

    monkeypatch.setattr(bench_airbench, "fit", once)
    with Run.create(tmp_path / "run", {}) as out, pytest.raises(KeyboardInterrupt):
        bench_airbench.run(config, out)
    warmup = (0, 1024)
    assert trained == [warmup, (0, 1438), (1, 1438), (2, 1438)]
    trained.clear()
    monkeypatch.setattr(bench_airbench, "fit", lambda model, data, recipe, **_: trained.append((recipe.seed, 0)))
    with Run.create(tmp_path / "run", {}) as out:
        bench_airbench.run(config, out)
        assert out.result("bench")["rows"]["width-4-epochs-1"]["accuracy"]["n"] == 3
    assert trained == [(0, 0), (2, 0)]  # steps before the measured ones, and the last seed
