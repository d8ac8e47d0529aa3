"""Measuring one case: gradients first, then rounds in which everyone has a turn, then memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.bench.station import arithmetic
from experiments.bench.summary import spread
from experiments.bench.work import FLOOR, OURS, PARITY, Case, Work
from experiments.bench.workers import Crew, Refused, Worker


@dataclass
class Entry:
    """A piece of work, its row in the making, and its bench in the worker (None where it failed)."""

    work: Work
    row: dict[str, Any]
    bench: int | None = None
    gradient: np.ndarray | None = None

    @classmethod
    def of(cls, work: Work) -> "Entry":
        """With a row that says what the work is."""
        about = asdict(work)
        row = {key: about.pop(key) for key in ("table", "case", "label", "peer", "layout")}
        row |= about.pop("problem") | about | {"arithmetic": arithmetic(work.device, work.problem.precision)}
        return cls(work, row)

    def ask(self, worker: Worker, command: str, *arguments: Any) -> Any:
        """The worker's answer; None, and an error in the row, where the peer refuses."""
        try:
            return worker.ask(command, *arguments, about=f"{self.work.case}, {self.work.label}, {self.work.layout}")
        except Refused as problem:
            self.row["error"] = str(problem)
            return None


def measure(
    case: Case, crew: Crew, repetitions: int, warmups: int, lead_in: int, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of ``case``; ``tick`` is told of each turn.

    Raises:
        WorkerError: when a worker dies.
    """
    entries = [Entry.of(work) for work in case.works]
    for entry in entries:
        if entry.work.timed:
            tick(entry.work.label)
            _prepare(entry, crew[entry.work.peer], warmups)
    _compare(entries)
    evaluations = next((e.row["nfe_forward"] for e in entries if "nfe_forward" in e.row), None)
    for work in case.floor:
        tick(FLOOR)
        if evaluations is not None:
            entry = Entry.of(work.chain(evaluations))
            _prepare(entry, crew[FLOOR], warmups)
            entries.append(entry)
    _rounds([entry for entry in entries if entry.bench is not None], crew, repetitions, lead_in, tick)
    for worker in crew:
        worker.ask("clear")
    for entry in entries:
        if entry.work.memory:
            tick(f"{entry.work.label}, memory")
            _memory(entry)
    return [entry.row for entry in entries]


def _prepare(entry: Entry, worker: Worker, warmups: int) -> None:
    found = entry.ask(worker, "prepare", entry.work, warmups)
    if found is not None:
        entry.bench, entry.gradient = found.pop("bench"), found.pop("gradient", None)
        entry.row |= found


def _compare(entries: Sequence[Entry]) -> None:
    """How far each gradient is from torchdiffeq's (or, where it is not at work or has but the adjoint, from ours)."""
    there = [entry for entry in entries if entry.gradient is not None]
    if not there:
        return
    plain = [e for e in there if e.work.gradient in ("backprop", "checkpoint")] or there
    reference = min(plain, key=lambda e: (e.work.peer != "torchdiffeq", e.work.peer != OURS))
    for entry in there:
        entry.row["parity"] = entry.work.parity
        entry.row["parity_solver"] = entry.work.twin
        entry.row["parity_reference"] = reference.work.label
        entry.row["gradient_difference"] = difference(entry.gradient, reference.gradient)


def difference(found: np.ndarray, reference: np.ndarray) -> float:
    """‖found − reference‖ / ‖reference‖."""
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def _rounds(entries: Sequence[Entry], crew: Crew, repetitions: int, lead_in: int, tick: Callable[[str], None]) -> None:
    taken: list[list[float]] = [[] for _ in entries]
    for _ in range(repetitions):
        for entry, seconds in zip(entries, taken, strict=True):
            tick(entry.work.label)
            found = entry.ask(crew[entry.work.peer], "repeat", entry.bench, lead_in)
            seconds.append(float("nan") if found is None else found)
    for entry, seconds in zip(entries, taken, strict=True):
        if "error" not in entry.row:
            entry.row |= {"seconds": spread(seconds), "rounds": seconds}


def _memory(entry: Entry) -> None:
    worker = Worker(entry.work.peer)
    try:
        worker.ready()
        found = entry.ask(worker, "memory", entry.work)
        if found is not None:
            entry.row |= found
    finally:
        worker.close(0.0)


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What spoils a comparison: ours failed, a gradient differs, or evaluations of f on one grid do."""
    found = []
    grids: dict[tuple[str, str], int] = {}
    for row in rows:
        who = f"{row['table']}, {row['case']}, {row['label']}, {row['layout']}"
        if "error" in row and row["peer"] == OURS:
            found.append(f"{who}: {row['error']}")
        if row.get("parity") in PARITY and not row["gradient_difference"] <= PARITY[row["parity"]]:
            found.append(f"{who}: its gradient is off by {row['gradient_difference']:.1e}")
        if row["steps"] is not None and "nfe_forward" in row:
            expected = grids.setdefault((row["table"], row["case"]), row["nfe_forward"])
            if expected != row["nfe_forward"]:
                found.append(f"{who}: {row['nfe_forward']} evaluations of f, where ours makes {expected}")
    return found
