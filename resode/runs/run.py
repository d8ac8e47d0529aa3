"""Run folders: one training or analysis on disk, whole at every moment.

    config.json        what was asked
    environment.json   where, when and by which code it was computed, and each time it was continued
    metrics.jsonl      one JSON object a line, in the order logged
    checkpoint.pt      the latest state to resume from
    results/*.json     what was found
    DONE               the time of the end, written last

A process may be killed at any moment, by SIGKILL too: the folder then opens, its checkpoint and every other
file is a complete one (the old or the new), and the metrics are whole lines. One process writes a run at a time,
held to it by an advisory lock on ``.lock`` that the kernel drops with the process. Any number may read.
Linux and macOS.
"""

import json
import os
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from resode.errors import RunError
from resode.runs.atomic import make_folder, replacing, sweep, sync_folder, write_atomic
from resode.runs.checkpoint import checkpoint_fault
from resode.runs.environment import environment, now
from resode.runs.lock import take_lock
from resode.runs.values import dump, plain, read_json, refuse_another

CONFIG, ENVIRONMENT, METRICS, CHECKPOINT = "config.json", "environment.json", "metrics.jsonl", "checkpoint.pt"
RESULTS, DONE = "results", "DONE"
# A Mac's file system takes DONE and done for one name.
OWN_NAMES = {name.lower() for name in (CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULTS, DONE)}


class Run:
    """A run folder: `create` makes or continues one, `open` reads one.

    Attributes:
        path: the folder, absolute.
        config: what ``config.json`` holds.

    A run that was created, or opened with ``write=True``, holds the folder's lock until `close`, the end of a
    ``with`` block, or the end of the process. In a forked child (a DataLoader's worker) the run only reads.
    The methods that write raise `RunError` without the lock, and when the system refuses the write.
    """

    path: Path
    config: dict[str, Any]

    def __init__(self, path: Path, config: dict[str, Any], lock: int | None = None) -> None:
        """Not for callers: `create` and `open` make runs. ``lock`` is a descriptor to own."""
        self.path = path
        self.config = config
        self._release: weakref.finalize | None = None
        if lock is not None:
            self._own(lock)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: object, *, device: str | torch.device = "cpu") -> Self:
        """Make the run folder ``path`` for ``config``, or continue the one that was made for the same config.

        The folder appears whole or not at all; parents are made; an empty folder may stand in its place. An
        unfinished run that is continued gets an entry in the ``continued`` list of ``environment.json``; a
        finished one is left as it is. Configs are compared as the JSON they become.

        Args:
            path: the folder.
            config: a mapping or a dataclass, as `jsonable` takes them, with finite numbers.
            device: what the run computes on, for ``environment.json``.

        Raises:
            RunError: when the folder belongs to another config (the keys that differ are named), holds
                something that is not a run, is being written by another process, or cannot be made; when the
                config is no JSON. Nothing is overwritten or left behind.
        """
        path = Path(path).resolve()
        settings = plain(config, "config", finite=True)
        if not isinstance(settings, dict):
            raise RunError(f"config is a {type(config).__name__}: it must be a mapping or a dataclass")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return cls._make(path, settings, device)
        run = cls.open(path)
        refuse_another(run.config, settings, path)
        run._hold()
        if not run.done:
            run._note_continued(device)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool = False) -> Self:
        """Open an existing run to read it, or with ``write`` to add to it.

        Raises:
            RunError: when there is no such folder, it is not a run, or its config cannot be read; with
                ``write``, when another process is writing it.
        """
        path = Path(path).resolve()
        if not path.exists():
            raise RunError(f"no run at {path}: give the folder of a run, or make one first")
        if not (path / CONFIG).is_file():
            raise RunError(f"{path} is not a run folder (it has no {CONFIG}): choose another folder")
        config = read_json(path / CONFIG)
        run = cls(path, config)
        if write:
            run._hold()
        return run

    def close(self) -> None:
        """Let go of the lock; what follows only reads. Closing twice is fine."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # -- metrics

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to the metrics, durably. NaN and infinities become null, which JSON has."""
        self._check_writable()
        rest = dump(plain(record, "record"), indent=None)
        try:
            with (self.path / METRICS).open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(start)  # half a line would be glued to the next record
                    raise
            if start == 0:
                sync_folder(self.path)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path / METRICS} ({error.strerror}): check the disk's space, then run "
                "the same command again"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records logged so far. A last line that was cut off by a kill is left out.

        Raises:
            RunError: when any other line is not a JSON object.
        """
        records = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise RunError(
                    f"line {number} of {self.path / METRICS} is not a JSON object: the file was changed by "
                    "something else; restore it from a copy, or run again in another folder"
                )
            records.append(record)
        return records

    def rewind(self, keep: int) -> None:
        """Keep the first ``keep`` records, and drop those that came after the checkpoint now resumed from.

        Raises:
            RunError: when there are fewer.
        """
        self._check_writable()
        lines = self._lines()
        if not 0 <= keep <= len(lines):
            raise RunError(
                f"{self.path / METRICS} has {len(lines)} records, and {keep} are to be kept: metrics and "
                "checkpoint are not of one run; restore both from a copy, or run again in another folder"
            )
        write_atomic(self.path / METRICS, b"".join(line + b"\n" for line in lines[:keep]))

    def _lines(self) -> list[bytes]:
        try:
            data = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        return data.split(b"\n")[:-1]  # a record ends with its newline: what follows the last one was cut off

    # -- checkpoint

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by ``state``: tensors and plain data, in dicts, lists and tuples.

        Raises:
            RunError: when ``state`` holds anything that `load_checkpoint` would refuse, which is better known
                now than on the day it is needed. The earlier checkpoint then stands.
        """
        self._check_writable()
        with replacing(self.path / CHECKPOINT) as file:
            torch.save(state, file)
            file.flush()
            if unsafe := get_unsafe_globals_in_checkpoint(file.name):
                raise RunError(
                    f"the state to save holds {', '.join(unsafe)}: a checkpoint takes tensors and plain data "
                    "only; convert it (float(x), str(path), torch.as_tensor(array))"
                )

    def load_checkpoint(self, map_location: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The state saved last, or None if there is none. No code in the file is run.

        Raises:
            RunError: when the file is damaged, or holds more than tensors and plain data.
        """
        path = self.path / CHECKPOINT
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with file:  # one open file: a writer may replace the path between the check and the load
            if fault := checkpoint_fault(file):
                raise RunError(
                    f"cannot load the checkpoint {path} ({fault}): restore it from a copy, or run "
                    "again in another folder"
                )
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)

    # -- results and other files

    def save_result(self, name: str, result: Mapping[str, Any]) -> Path:
        """Write ``result`` to ``results/NAME.json``, keys in their order, NaN and infinities as null."""
        self._check_writable()
        path = self._result_path(name)
        write_atomic(path, dump(plain(result, f"result {name}")))
        return path

    def result(self, name: str) -> dict[str, Any]:
        """The result that was saved as ``name``.

        Raises:
            RunError: when there is none, or it cannot be read.
        """
        path = self._result_path(name)
        if not path.is_file():
            there = ", ".join(sorted(each.stem for each in path.parent.glob("*.json"))) or "none"
            raise RunError(
                f"{self.path} has no result {name!r} (it has: {there}): run the analysis that makes it first"
            )
        return read_json(path)

    def write(self, name: str, data: str | bytes) -> Path:
        """Write any other file of the run: ``report.html``, ``figures/spectrum.png``.

        Raises:
            RunError: when ``name`` leaves the folder, is hidden, or is a file that the run keeps itself.
        """
        self._check_writable()
        if any(part in ("", "..") or part.startswith(".") for part in name.split("/")):
            raise RunError(f"cannot write {name!r} in a run: give a relative path, such as figures/lesion.png")
        if name.lower() in OWN_NAMES:
            raise RunError(f"cannot write {name!r} in a run: the run keeps it itself; choose another name")
        path = self.path / name
        write_atomic(path, data)
        return path

    def _result_path(self, name: str) -> Path:
        if not re.fullmatch(r"\w[\w.+=-]*", name):
            raise RunError(f"{name!r} cannot name a result: use letters, digits and _ . + = -")
        return self.path / RESULTS / f"{name}.json"

    # -- the end

    def finish(self) -> None:
        """Write DONE, the last file of a run."""
        self._check_writable()
        write_atomic(self.path / DONE, f"{now()}\n")

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / DONE).is_file()

    # -- making, holding, continuing

    @classmethod
    def _make(cls, path: Path, config: dict[str, Any], device: str | torch.device) -> Self:
        # The draft's name is fixed, and its lock is taken before anything is written: two processes cannot make
        # one run, what a killed one left is taken over by the next, and the rename carries the lock along.
        draft = path.with_name(f".{path.name}.draft")
        provenance = environment(device) | {"continued": []}
        try:
            make_folder(draft)
        except OSError as error:
            raise _cannot_make(path, error) from error
        lock = take_lock(draft, path)
        try:
            sweep(draft)
            write_atomic(draft / CONFIG, dump(config))
            write_atomic(draft / ENVIRONMENT, dump(provenance))
            draft.rename(path)
            sync_folder(path.parent)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)
            if isinstance(error, OSError):
                raise _cannot_make(path, error) from error
            raise
        return cls(path, config, lock)

    def _hold(self) -> None:
        self._own(take_lock(self.path, self.path))
        # With the lock, what lies half-written was left by a killed process, and nobody is still writing it.
        sweep(self.path)
        if (self.path / METRICS).exists():
            os.truncate(self.path / METRICS, sum(len(line) + 1 for line in self._lines()))

    def _own(self, lock: int) -> None:
        self._release = weakref.finalize(self, os.close, lock)
        _held.add(self)

    def _check_writable(self) -> None:
        if self._release is None or not self._release.alive:
            raise RunError(f"run {self.path} is open for reading only: use Run.open(path, write=True)")

    def _note_continued(self, device: str | torch.device) -> None:
        provenance = read_json(self.path / ENVIRONMENT)
        provenance["continued"] = [*provenance.get("continued", []), environment(device)]
        write_atomic(self.path / ENVIRONMENT, dump(provenance))


# A forked child inherits the lock's descriptor, and the kernel keeps the lock while any copy is open: the workers
# of a killed training would bar its restart for as long as they outlive it. So a child drops its copy at once.
_held: weakref.WeakSet[Run] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [run.close() for run in list(_held)])


def _cannot_make(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot make the run folder {path} ({error.strerror}): choose another folder")
