"""An analysis over a data set that can be stopped and taken up again: the sums so far, in a file.

The file says what was analysed, by a fingerprint of the network, of the changed ones and of the question, and on what
data, by a digest of the batches gone through. Another network, another question or other data are refused.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resode.dynamics import ResidualDynamics, Step
from resode.errors import InvalidInput
from resode.paths.interventions import changes_of
from resode.paths.scores import Tallies
from resode.runs import write_atomic

SECONDS = 10.0
"""Between two writes of the file."""


class Progress:
    """The progress of one analysis.

    Args:
        path: the file; None keeps none.
        fingerprint: of what is analysed.

    Raises:
        InvalidInput: when the file holds the progress of another analysis, or cannot be read.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.batches = 0
        self._digest = ""
        self._written = time.monotonic()
        self._held = None if path is None or not path.exists() else _read(path, fingerprint)

    @property
    def done(self) -> int:
        """The number of batches whose sums the file holds."""
        return 0 if self._held is None else self._held["batches"]

    def resume(self, data: Iterable[tuple[Tensor, Tensor]], tallies: Tallies) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``data`` that are still to be gone through; the sums of the others go into ``tallies``.

        Raises:
            InvalidInput: when the data are not those of the file.
        """
        for x, labels in data:
            if self.path is not None:
                self._digest = _digest(self._digest, x, labels)
            if self.batches < self.done:
                self.batches += 1
                if self.batches == self.done:
                    self._take_up(tallies, labels.device)
                continue
            yield x, labels
            self.batches += 1
            self._save(tallies)
        if self.batches < self.done:
            raise InvalidInput(
                f"{self.path} is of {self.done} batches, and the data have {self.batches}: give the same, or remove "
                "the file"
            )

    def finish(self) -> None:
        """The analysis is done: its result takes the place of the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _take_up(self, tallies: Tallies, device: torch.device) -> None:
        if self._digest != self._held["digest"]:
            raise InvalidInput(
                f"{self.path} is of other data (in another order, or other batches): give the same, or remove the file"
            )
        try:
            tallies.restore(self._held["tallies"], device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error

    def _save(self, tallies: Tallies) -> None:
        if self.path is None or time.monotonic() - self._written < SECONDS:
            return
        held = {
            "fingerprint": self.fingerprint,
            "batches": self.batches,
            "digest": self._digest,
            "tallies": tallies.state(),
        }
        write_atomic(self.path, json.dumps(held))
        self._written = time.monotonic()


def fingerprint(view: ResidualDynamics, networks: Sequence[Sequence[Step]], question: Any) -> str:
    """What tells one analysis from another.

    Args:
        view: counts with its steps, and with the settings, parameters and buffers of its model.
        networks: the steps of each of the changed networks. Of a step that is the view's own, its place there counts;
            of another, what the vocabulary of interventions knows of it.
        question: JSON.
    """
    own = {id(step): place for place, step in enumerate(view.steps)}
    changed = [
        [(i, own.get(id(step), _of_step(step))) for i, step in enumerate(steps) if step is not view.steps[i]]
        for steps in networks
    ]
    asked = [question, [_of_step(step) for step in view.steps], changed, str(view.model)]
    found = hashlib.sha256(json.dumps(asked).encode())
    for name, tensor in ({} if view.model is None else view.model.state_dict()).items():
        found.update(name.encode() + _bytes(tensor))
    return found.hexdigest()


def _of_step(step: Step) -> list[Any]:
    scale = step.scale.tolist() if isinstance(step.scale, Tensor) else float(step.scale)
    return [step.kind, step.label, step.stage, step.t, step.end, scale, step.is_deleted, *changes_of(step)]


def _digest(before: str, x: Tensor, labels: Tensor) -> str:
    return hashlib.sha256(before.encode() + _bytes(x) + _bytes(labels)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        found, batches = held["fingerprint"], held["batches"]
        if not (isinstance(batches, int) and {"digest", "tallies"} <= held.keys()):
            raise ValueError("it says not how far it came")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if found != expected:
        raise InvalidInput(
            f"{path} holds the progress of another analysis (another network, or other settings): remove it, or name "
            "another file"
        )
    return held


def _damaged(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"{path} is no progress of an analysis ({error}): remove it, or name another file")
