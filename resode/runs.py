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

import dataclasses
import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from resode.atomic import make_folder, replacing, sweep, sync_folder, write_atomic
from resode.errors import RunError

__all__ = ["Run", "environment", "jsonable", "write_atomic"]

CONFIG, ENVIRONMENT, METRICS, CHECKPOINT = "config.json", "environment.json", "metrics.jsonl", "checkpoint.pt"
RESULTS, DONE = "results", "DONE"
# A Mac's file system takes DONE and done for one name.
OWN_NAMES = {name.lower() for name in (CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULTS, DONE)}
PACKAGES = ("resode", "torchvision", "torchdiffeq", "numpy")


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
        plain = _plain(config, "config", finite=True)
        if not isinstance(plain, dict):
            raise RunError(f"config is a {type(config).__name__}: it must be a mapping or a dataclass")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return cls._make(path, plain, device)
        run = cls.open(path)
        _refuse_another(run.config, plain, path)
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
        config = _read_json(path / CONFIG)
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
        rest = _dump(_plain(record, "record"), indent=None)
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
            if fault := _fault(file):
                raise RunError(
                    f"cannot load the checkpoint {path} ({fault}): restore it from a copy, or delete it to "
                    "start the run over"
                )
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)

    # -- results and other files

    def save_result(self, name: str, result: Mapping[str, Any]) -> Path:
        """Write ``result`` to ``results/NAME.json``, keys in their order, NaN and infinities as null."""
        self._check_writable()
        path = self._result_path(name)
        write_atomic(path, _dump(_plain(result, f"result {name}")))
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
        return _read_json(path)

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
        write_atomic(self.path / DONE, f"{_now()}\n")

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
        lock = _lock(draft, path)
        try:
            sweep(draft)
            write_atomic(draft / CONFIG, _dump(config))
            write_atomic(draft / ENVIRONMENT, _dump(provenance))
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
        self._own(_lock(self.path, self.path))
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
        provenance = _read_json(self.path / ENVIRONMENT)
        provenance["continued"] = [*provenance.get("continued", []), environment(device)]
        write_atomic(self.path / ENVIRONMENT, _dump(provenance))


# A forked child inherits the lock's descriptor, and the kernel keeps the lock while any copy is open: the workers
# of a killed training would bar its restart for as long as they outlive it. So a child drops its copy at once.
_held: weakref.WeakSet[Run] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [run.close() for run in list(_held)])


def environment(device: str | torch.device) -> dict[str, Any]:
    """Where, when and by which code something is computed on ``device``: what goes beside every result.

    ``git`` has the revision of resode's own checkout, and whether any Python file or pyproject.toml there differs
    from it (untracked ones count: an experiment not yet committed changes numbers as well; results and notes do
    not). It is None when resode runs from somewhere else, as from site-packages.
    """
    device = torch.device(device)
    return {
        "time": _now(),
        "command": shlex.join(sys.orig_argv),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its CUDA
        | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": {"type": device.type, "name": _device_name(device)},
        "threads": torch.get_num_threads(),
        "git": _revision(Path(__file__).resolve()),
    }


def jsonable(obj: object) -> Any:
    """``obj`` as JSON has it.

    Dataclasses and mappings become dicts; tuples, lists, arrays and tensors lists; paths strings; enums their
    values; NaN and infinities None.

    Raises:
        RunError: for anything else, named by its key, and for keys that are neither strings nor integers.
    """
    return _plain(obj, "value")


def _plain(obj: object, where: str, finite: bool = False) -> Any:
    """`jsonable`; ``where`` names ``obj`` in errors. With ``finite``, NaN and infinities are errors, not None."""
    if isinstance(obj, Enum):
        return _plain(obj.value, where, finite)
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, str | int):
        return str(obj) if isinstance(obj, str) else int(obj)
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        if finite:
            raise RunError(f"{where} is {float(obj)}, which JSON does not have: use None, or a finite number")
        return None
    if isinstance(obj, os.PathLike):
        return os.fsdecode(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        result: dict[str, Any] = {}
        for key, value in obj.items():
            if not isinstance(key, str | int) or isinstance(key, bool) or str(key) in result:
                raise RunError(f"{where} has the key {key!r}: use strings or integers, each of them once")
            result[str(key)] = _plain(value, f"{where}.{key}", finite)
        return result
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{i}]", finite) for i, value in enumerate(obj)]
    if callable(tolist := getattr(obj, "tolist", None)):  # arrays and tensors, their scalars too
        return _plain(tolist(), where, finite)
    raise RunError(
        f"{where} is a {type(obj).__name__}, which JSON does not have: use numbers, strings, None, lists, "
        "mappings, dataclasses or paths"
    )


def _dump(obj: Any, indent: int | None = 1) -> bytes:
    return (json.dumps(obj, indent=indent, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path} ({error}): restore it from a copy, or run again in another folder"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object: restore it from a copy, or run again in another folder")
    return value


def _refuse_another(there: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    """Raise if the run at ``path``, made for the config ``there``, is not one for ``here``."""

    def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in config.items():
            nested = isinstance(value, dict) and value
            flat |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return flat

    def show(config: dict[str, Any], key: str) -> str:
        text = json.dumps(config[key]) if key in config else "absent"
        return text if len(text) <= 60 else text[:57] + "..."

    old, new, absent = leaves(there), leaves(here), object()
    differing = [key for key in old | new if old.get(key, absent) != new.get(key, absent)]
    if differing:
        named = "; ".join(f"{key} is {show(old, key)} there, {show(new, key)} here" for key in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise RunError(f"{path} belongs to another configuration: {named}{more}; choose another folder")


def _cannot_make(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot make the run folder {path} ({error.strerror}): choose another folder")


def _lock(folder: Path, run: Path) -> int:
    """Take the lock of ``folder``, where ``run`` is or is being made: a descriptor that holds it until closed."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    path = folder / ".lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"cannot lock the run {run} ({error.strerror}): check the folder's permissions, or choose another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have renamed or removed the folder since we opened the file: then this locks nothing.
        if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
            raise BlockingIOError
        os.ftruncate(lock, 0)
        os.pwrite(lock, me.encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        os.close(lock)
        todo = "close that Run first" if holder == me else "wait until it ends, or choose another folder"
        raise RunError(f"run {run} is being written by {holder}: {todo}") from None
    except OSError as error:
        os.close(lock)
        raise RunError(
            f"cannot lock the run {run} ({error.strerror}): choose a folder on a file system with locks"
        ) from error
    return lock


def _fault(file: BinaryIO) -> str | None:
    """Why a checkpoint is not to be loaded, without loading it."""
    try:
        with zipfile.ZipFile(file) as archive:
            # torch.load compares no checksums: flipped bits would pass for weights.
            if damaged := archive.testzip():
                return f"damaged: the checksum of {damaged} is wrong"
        file.seek(0)
        unsafe = get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # a damaged file raises whatever its damage leads to
        return f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}"
    return f"it holds {', '.join(unsafe)}, not only tensors and plain data" if unsafe else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.machine()


def _revision(source: Path) -> dict[str, Any] | None:
    """The revision of the checkout that tracks ``source``, or None.

    That git tracks the file is the point: an installed package often lies in another repository (a .venv).
    """

    def git(*arguments: str) -> str | None:
        return _output("git", "-C", str(source.parent), *arguments)

    revision = git("rev-parse", "HEAD")
    if revision is None or git("ls-files", "--error-unmatch", "--", source.name) is None:
        return None
    code = (":(top)*.py", ":(top)pyproject.toml")
    changes = git("status", "--porcelain", "--untracked-files=all", "--", *code)
    return {"revision": revision, "dirty": None if changes is None else changes != ""}


def _output(*command: str) -> str | None:
    # In a git hook these name the repository of the hook, not of the package.
    elsewhere = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    variables = {key: value for key, value in os.environ.items() if key not in elsewhere}
    try:
        return subprocess.run(
            command,
            env=variables | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
