"""Run folders: whole whatever happens, of one config, written by one process, and never a way to run code."""

import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from resode.errors import RunError
from resode.runs import Run, environment, jsonable, write_atomic
from resode.runs.environment import revision


@dataclass(frozen=True)
class Inner:
    norm: str = "batch"
    widths: tuple[int, ...] = (16, 32)


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    data: Path = Path("data/digits")
    stack: Inner = Inner()
    limit: int | None = None


def everything_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def one_line(error):
    return "\n" not in str(error.value)


# -- making, continuing, opening


def test_a_new_run_has_its_config_and_its_environment(tmp_path):
    with Run.create(tmp_path / "a" / "b" / "run", Config()) as run:
        pass
    assert everything_in(tmp_path / "a" / "b") == {
        "run",
        "run/.lock",
        "run/config.json",
        "run/environment.json",
    }
    config = {"lr": 0.1, "data": "data/digits", "stack": {"norm": "batch", "widths": [16, 32]}, "limit": None}
    assert json.loads((run.path / "config.json").read_text()) == run.config == config == Run.open(run.path).config
    assert not run.done


def test_an_empty_folder_becomes_the_run(tmp_path):
    with Run.create(tmp_path / "new", {"seed": 1}):
        pass
    (tmp_path / "empty").mkdir()
    with Run.create(tmp_path / "empty", {"seed": 1}):
        pass
    assert everything_in(tmp_path / "empty") == everything_in(tmp_path / "new")


def test_the_same_config_continues_and_says_so(tmp_path):
    with Run.create(tmp_path / "run", Config()) as run:
        run.log({"loss": 1.0})
    first = json.loads((run.path / "environment.json").read_text())
    with Run.create(tmp_path / "run", Config()) as run:
        assert run.metrics() == [{"loss": 1.0}]
        run.finish()
    second = json.loads((run.path / "environment.json").read_text())
    assert first.pop("continued") == []
    (entry,) = second.pop("continued")
    assert second == first  # how it began is not rewritten
    assert entry.keys() == first.keys()
    with Run.create(tmp_path / "run", Config()) as run:  # finished: nothing is continued
        assert run.done
    assert len(json.loads((run.path / "environment.json").read_text())["continued"]) == 1


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    with Run.create(tmp_path / "run", Config()) as run:
        run.log({"loss": 1.0})
    before = {name: (run.path / name).read_bytes() for name in everything_in(run.path)}
    with pytest.raises(RunError) as error:
        Run.create(tmp_path / "run", replace(Config(lr=0.2), stack=Inner("layer")))
    message = str(error.value)
    assert "lr is 0.1 there, 0.2 here" in message
    assert 'stack.norm is "batch" there, "layer" here' in message
    assert "widths" not in message
    assert "choose another folder" in message
    assert one_line(error)
    assert {name: (run.path / name).read_bytes() for name in everything_in(run.path)} == before


def test_a_key_on_one_side_only_is_a_difference_and_many_are_counted(tmp_path):
    Run.create(tmp_path / "run", {"seed": 1, "a": None}).close()
    with pytest.raises(RunError, match="a is null there, absent here; b is absent there, 2 here"):
        Run.create(tmp_path / "run", {"seed": 1, "b": 2})
    with pytest.raises(RunError, match=r"\(and 3 more\)"):
        Run.create(tmp_path / "run", {"seed": 1, "a": None} | {f"k{i}": i for i in range(8)})


def test_what_is_not_a_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = everything_in(tmp_path)
    for make in (lambda path: Run.create(path, {}), Run.open, lambda path: Run.open(path, write=True)):
        for name in ("notes", "file", "file/below"):
            with pytest.raises(RunError, match=name) as error:
                make(tmp_path / name)
            assert one_line(error)
    with pytest.raises(RunError, match="no run at"):
        Run.open(tmp_path / "absent")
    assert everything_in(tmp_path) == before


def test_an_unreadable_config_is_an_error(tmp_path):
    run = Run.create(tmp_path / "run", {"seed": 1})
    for content in (b"{", b"[1]", b"\xff"):
        (run.path / "config.json").write_bytes(content)
        with pytest.raises(RunError, match=r"config\.json") as error:
            Run.open(run.path)
        assert one_line(error)


def test_a_failed_create_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"config\.lr is nan"):  # null would be taken for None
        Run.create(tmp_path / "run", {"lr": float("nan")})
    with pytest.raises(RunError, match=r"config\.model is a"):
        Run.create(tmp_path / "run", {"model": object()})
    with pytest.raises(RunError, match="config is a list"):
        Run.create(tmp_path / "run", [1])
    with monkeypatch.context() as patched:
        patched.setattr("resode.runs.run.environment", lambda device: {"big": "x" * 10_000})
        with file_size_limit(5_000), pytest.raises(RunError, match="space"):
            Run.create(tmp_path / "run", {})
    with monkeypatch.context() as patched:  # interrupted after the draft was written
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Run.create(tmp_path / "run", {})
    assert everything_in(tmp_path) == set()
    Run.create(tmp_path / "run", {}).close()


def test_a_full_disk_is_not_taken_for_one_without_locks(tmp_path):
    """Not even the holder's name can be written into the lock then."""
    with file_size_limit(0), pytest.raises(RunError, match="space") as caught:
        Run.create(tmp_path / "run", {})
    assert "locks" not in str(caught.value)
    assert everything_in(tmp_path) == set()


# -- the lock, and what a kill leaves

WORKERS = """
import itertools, os, signal, sys, time
import torch
import resode.runs.run as runs
from resode.runs import Run

torch.set_num_threads(1)  # before the fork, so that no thread is lost in it

def say(word):
    print(word, flush=True)

def hold(path):
    run = Run.create(path, {"seed": 1})
    say("held")
    time.sleep(60)

def parent(path):
    run = Run.create(path, {"seed": 1})
    if os.fork() == 0:
        try:
            run.log({})
        except runs.RunError as error:
            say(os.getpid() if "reading only" in str(error) else error)
    time.sleep(60)

def train(path):
    run = Run.create(path, {"seed": 1})
    state = run.load_checkpoint()
    start = 0 if state is None else state["step"] + 1
    run.rewind(start)
    for step in itertools.count(start):
        run.log({"step": step, "text": "x" * 20_000})
        run.save_checkpoint({"step": step, "weights": torch.full((300_000,), float(step))})
        run.save_result("latest", {"step": step, "copies": [step] * 5_000})

def make(path):
    runs.environment = lambda device: {"text": "x" * 100_000}  # quick: the kills are to hit the writing
    for i in itertools.count():
        Run.create(f"{path}/{i}", {"seed": 1}).close()

worker = None
for line in itertools.chain(sys.stdin, ["kill"]):
    if line.strip() != "kill":
        role, path = line.split(maxsplit=1)
        worker = os.fork()
        if worker == 0:
            try:
                globals()[role](path.rstrip())
            finally:
                os._exit(1)
        say(worker)
    elif worker is not None:  # ours, and not yet waited for: the number cannot have passed to another process
        os.kill(worker, signal.SIGKILL)
        say(os.waitpid(worker, 0)[1])
        worker = None
"""


class Workers:
    """A process with torch imported that forks one worker at a time, and ends it by SIGKILL when told."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = None

    def say(self, *words):
        print(*words, file=self.process.stdin, flush=True)

    def start(self, role, path):
        self.say(role, path)
        self.pid = int(self.hear())

    def hear(self):
        return self.process.stdout.readline().strip()

    def kill(self):
        self.pid = None
        self.say("kill")
        assert int(self.hear()) == signal.SIGKILL  # it was still at work: no error had ended it


def moments(rng, longest):
    """Random waits before a kill, slowly longer, so that a slow machine gets there as well."""
    for attempt in range(200):
        yield rng.uniform(0.0, longest) * (1 + attempt / 20)


@pytest.fixture(scope="module")
def forker() -> Iterator[Workers]:
    workers = Workers()
    with workers.process:
        yield workers
        workers.process.stdin.close()


@pytest.fixture
def workers(forker) -> Iterator[Workers]:
    yield forker
    if forker.pid is not None:  # the test failed before it killed its worker
        forker.kill()


def test_killed_at_any_moment_a_run_stays_whole_and_resumes(workers, tmp_path):
    path, reached = tmp_path / "run", []
    Run.create(path, {"seed": 1}).close()
    for moment in moments(random.Random(0), longest=0.15):
        workers.start("train", path)
        time.sleep(moment)
        workers.kill()
        run = Run.open(path)
        records, state = run.metrics(), run.load_checkpoint()
        assert [record["step"] for record in records] == list(range(len(records)))
        if state is not None:
            assert torch.equal(state["weights"], torch.full((300_000,), float(state["step"])))
            assert len(records) in (state["step"] + 1, state["step"] + 2)
            reached.append(state["step"])
        if (path / "results" / "latest.json").exists():
            latest = run.result("latest")
            assert latest["copies"] == [latest["step"]] * 5_000
        if len(set(reached)) >= 12:  # so many kills came while it was at work
            break
    else:
        pytest.fail(f"the checkpoints seen in 200 kills are of steps {sorted(set(reached))}")
    assert reached == sorted(reached)
    with Run.create(path, {"seed": 1}):  # the lock is free, and what was half-written is gone
        assert not list(path.rglob(".*.tmp"))


def test_killed_while_making_runs_each_is_whole_or_absent(workers, tmp_path):
    made = drafts = 0
    for attempt, moment in enumerate(moments(random.Random(1), longest=0.03)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        workers.start("make", folder)
        time.sleep(moment)
        workers.kill()
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in visible:
            assert Run.open(path).config == {"seed": 1}
            assert len(json.loads((path / "environment.json").read_text())["text"]) == 100_000
        made += len(visible)
        drafts += len(list(folder.glob(".*")))
        Run.create(folder / str(len(visible)), {"seed": 1}).close()  # the next one takes the draft over
        assert not list(folder.glob(".*"))
        if made >= 10 and drafts >= 10:  # so many kills hit the making
            break
    else:
        pytest.fail(f"200 kills met {made} runs and {drafts} drafts")


def test_one_process_writes_a_run(workers, tmp_path):
    path = tmp_path / "run"
    workers.start("hold", path)
    assert workers.hear() == "held"
    for take in (lambda: Run.create(path, {"seed": 1}), lambda: Run.open(path, write=True)):
        with pytest.raises(RunError, match=f"process {workers.pid} ") as error:
            take()
        assert one_line(error)
    reader = Run.open(path)
    assert reader.metrics() == []
    workers.kill()
    with Run.create(path, {"seed": 1}) as run:
        run.log({"step": 0})
    assert reader.metrics() == [{"step": 0}]


def test_a_fork_only_reads_and_does_not_keep_the_lock(workers, tmp_path):
    workers.start("parent", tmp_path / "run")
    child = int(workers.hear())  # it says so once its log was refused
    workers.kill()
    try:
        Run.create(tmp_path / "run", {"seed": 1}).close()
        os.kill(child, 0)  # it lived all the while
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_lock_of_a_folder_that_went_away_before_it_was_taken_counts_for_nothing(tmp_path, monkeypatch, replaced):
    """As when another process makes the run in the meantime: its draft was renamed, and we hold a file in it."""
    Run.create(tmp_path / "run", {}).close()
    flock = fcntl.flock

    def late(descriptor, how):
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if replaced:
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(RunError, match="is being written by"):
            Run.open(tmp_path / "run", write=True)
    Run.open(tmp_path / "elsewhere", write=True).close()  # and is let go of


def test_the_lock_goes_with_close_and_with_the_object(tmp_path):
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(RunError, match="close that Run first"):
        Run.create(tmp_path / "run", {})
    run.close()
    run.close()
    again = Run.open(tmp_path / "run", write=True)
    again.log({})
    del again
    Run.create(tmp_path / "run", {}).close()


def test_reading_only_means_it(tmp_path):
    Run.create(tmp_path / "run", {}).close()
    run = Run.open(tmp_path / "run")
    before = everything_in(run.path)
    for act in (
        lambda: run.log({}),
        lambda: run.rewind(0),
        lambda: run.save_checkpoint({}),
        lambda: run.save_result("x", {}),
        lambda: run.write("x.txt", "x"),
        run.finish,
    ):
        with pytest.raises(RunError, match="reading only"):
            act()
    assert everything_in(run.path) == before


# -- metrics


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    with Run.create(tmp_path / "run", {"seed": 1}) as run:
        yield run


def test_metrics_come_back_in_order_and_the_file_is_json(run):
    run.log({"step": 0, "loss": float("nan"), "deep": [float("inf"), (1, 2)]})
    run.log({"step": 1, "loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
    assert run.metrics() == [
        {"step": 0, "loss": None, "deep": [None, [1, 2]]},
        {"step": 1, "loss": 0.5, "accuracy": 0.25},
    ]
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # called for NaN and Infinity


def test_a_torn_last_line_is_dropped_and_the_next_record_starts_a_line(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        run.log({"step": 0})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1')
        assert run.metrics() == [{"step": 0}]
    with Run.create(tmp_path / "run", {}) as run:
        run.log({"step": 2})
        assert run.metrics() == [{"step": 0}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", "\x00\x00"])
def test_a_torn_line_elsewhere_is_an_error_with_its_number(run, line):
    run.log({"step": 0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    run.log({"step": 2})
    with pytest.raises(RunError, match=r"line 2 of .*metrics.jsonl") as error:
        run.metrics()
    assert one_line(error)


def test_rewind_keeps_the_first_records(run):
    for step in range(4):
        run.log({"step": step})
    run.rewind(2)
    assert run.metrics() == [{"step": 0}, {"step": 1}]
    run.log({"step": 5})
    assert run.metrics() == [{"step": 0}, {"step": 1}, {"step": 5}]
    for keep in (4, -1):
        with pytest.raises(RunError, match=f"has 3 records, and {keep} are to be kept"):
            run.rewind(keep)
    assert len(run.metrics()) == 3


# -- checkpoints


def test_a_checkpoint_comes_back_equal(run):
    assert run.load_checkpoint() is None
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        run.save_checkpoint(
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "random": random.getstate(),
                "step": step,
            }
        )
    state = Run.open(run.path).load_checkpoint()
    assert state["step"] == 2
    assert state["random"] == random.getstate()
    torch.testing.assert_close(state["net"], dict(net.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"], optimizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(state["rng"], torch.get_rng_state())


def truncated(raw):
    return raw[: len(raw) // 2]


def flipped(raw):
    middle = len(raw) // 2  # in the weights: the archive itself stays readable
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda raw: b"", lambda raw: b"not a checkpoint" * 99])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(run, damage):
    run.save_checkpoint({"weights": torch.ones(10_000)})
    path = run.path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        RunError, match=r"checkpoint\.pt .*restore it from a copy, or run again in another folder"
    ) as error:
        run.load_checkpoint()
    assert one_line(error)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["bare pickle", "torch.save"])
def test_code_in_a_checkpoint_is_refused_and_not_run(run, tmp_path, form):
    trap, path = Trap(tmp_path / "sprung"), run.path / "checkpoint.pt"
    if form == "torch.save":
        torch.save({"net": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    with pytest.raises(RunError, match=r"checkpoint\.pt \((damaged|it holds)") as error:
        run.load_checkpoint()
    assert one_line(error)
    assert not (tmp_path / "sprung").exists()
    if form == "torch.save":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap was armed


def test_what_could_not_be_loaded_is_not_saved(run):
    run.save_checkpoint({"step": 1})
    for value in (Path("x"), np.ones(3), np.float64(1.0), Inner()):
        with pytest.raises(RunError, match="tensors and plain data") as error:
            run.save_checkpoint({"step": 2, "value": value})
        assert one_line(error)
    assert run.load_checkpoint() == {"step": 1}
    assert not list(run.path.rglob(".*.tmp"))


def test_a_device_that_is_not_there_does_not_accuse_the_file(run):
    run.save_checkpoint({"weights": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"(?i)device|backend"):  # "delete it" would be bad advice here
        run.load_checkpoint("cuda:99")


# -- results and other files


def test_results_keep_their_order_and_come_back(run):
    path = run.save_result("lesion", {"z": 1, "a": np.arange(3), "mean": float("nan")})
    assert path == run.path / "results" / "lesion.json"
    assert list(run.result("lesion").items()) == [("z", 1), ("a", [0, 1, 2]), ("mean", None)]
    with pytest.raises(RunError, match=r"no result 'spectrum' \(it has: lesion\)"):
        run.result("spectrum")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", ".hidden", "a\nb", "x "])
def test_a_result_cannot_leave_its_folder(run, name):
    with pytest.raises(RunError, match="cannot name a result"):
        run.save_result(name, {})
    with pytest.raises(RunError, match="cannot name a result"):
        run.result(name)


def test_other_files_of_a_run(run):
    assert run.write("report.html", "<p>λ</p>").read_text(encoding="utf-8") == "<p>λ</p>"
    assert run.write("figures/deep/x.png", b"\x89PNG").read_bytes() == b"\x89PNG"
    assert run.write("figures/deep/x.png", b"2").read_bytes() == b"2"
    assert everything_in(run.path / "figures") == {"deep", "deep/x.png"}


@pytest.mark.parametrize("name", ["", "../x", "/tmp/x", "a//b", "a/../../x", ".lock", "config.json", "done", "results"])
def test_a_file_cannot_leave_the_run_nor_replace_its_own(run, name):
    before = everything_in(run.path.parent)
    with pytest.raises(RunError, match="cannot write"):
        run.write(name, "x")
    assert everything_in(run.path.parent) == before


def test_finish_is_the_end(run):
    assert not run.done
    run.finish()
    assert run.done
    assert Run.open(run.path).done


# -- failed writes


class file_size_limit:  # noqa: N801
    """A disk that is full: writing beyond ``size`` bytes of a file fails."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_what_was_there(run):
    run.log({"step": 0})
    run.save_checkpoint({"step": 0})
    run.save_result("x", {"step": 0})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for act in (
        lambda: run.log({"step": "x" * 20_000}),
        lambda: run.save_checkpoint({"weights": torch.ones(20_000)}),
        lambda: run.save_result("x", {"step": "x" * 20_000}),
        lambda: write_atomic(run.path / "results" / "x.json", b"x" * 20_000),
    ):
        with file_size_limit(10_000), pytest.raises(RunError, match="space") as error:
            act()
        assert one_line(error)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


# -- JSON and provenance


class Kind(Enum):
    ODE = "ode"


def test_jsonable():
    value = {
        1: Inner(),
        "kind": Kind.ODE,
        "array": np.array([[1.5, np.nan]]),
        "tensor": torch.tensor([1, 2]),
        "scalar": np.int64(3),
        "path": Path("a/b"),
        "none": None,
        "flag": True,
    }
    plain = jsonable(value)
    assert plain == {
        "1": {"norm": "batch", "widths": [16, 32]},
        "kind": "ode",
        "array": [[1.5, None]],
        "tensor": [1, 2],
        "scalar": 3,
        "path": "a/b",
        "none": None,
        "flag": True,
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain == jsonable(plain)


@pytest.mark.parametrize("value", [{"a": [1, object()]}, {"a": {1, 2}}, {"a": b"x"}, {"a": Inner}, {"a": 1j}])
def test_what_json_lacks_is_named(value):
    with pytest.raises(RunError, match=r"value\.a.* is a "):
        jsonable(value)


@pytest.mark.parametrize("value", [{1: "a", "1": "b"}, {None: 1}, {(1, 2): 3}, {True: 1}])
def test_a_key_is_never_lost_or_renamed_in_silence(value):
    with pytest.raises(RunError, match="has the key"):
        jsonable(value)


def test_environment_says_where_and_when(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python", "-m", "experiments.lesion", "cpu"])
    here = environment("cpu")
    assert json.loads(json.dumps(here)) == here
    assert here["versions"]["torch"] == torch.__version__
    assert all(here["versions"][name] for name in ("python", "resode", "torchvision", "torchdiffeq", "numpy"))
    assert here["device"]["type"] == "cpu"
    assert here["device"]["name"]
    assert here["threads"] == torch.get_num_threads()
    assert here["time"].endswith("+00:00")
    assert here["command"] == "python -m experiments.lesion cpu"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", "-C", tmp_path, *identity, *arguments], text=True).strip()

    source, installed = tmp_path / "package" / "runs.py", tmp_path / "venv" / "runs.py"
    for path in (source, installed):
        path.parent.mkdir()
        path.write_text("x = 1\n")
    assert revision(source) is None  # no repository
    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("venv\n")
    assert revision(source) is None  # no commit
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a git hook
    clean = {"revision": (tmp_path / ".git/refs/heads" / branch(tmp_path)).read_text().strip(), "dirty": False}
    assert revision(source) == clean
    assert revision(installed) is None  # inside the repository, but not of it
    (tmp_path / "results.json").write_text("{}")
    assert revision(source) == clean
    (tmp_path / "experiment.py").write_text("y = 1\n")
    assert revision(source) == clean | {"dirty": True}
    (tmp_path / "experiment.py").unlink()
    source.write_text("x = 2\n")
    assert revision(source) == clean | {"dirty": True}


def branch(repository):
    return (repository / ".git" / "HEAD").read_text().strip().rpartition("/")[2]
