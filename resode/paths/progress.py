"""An analysis over a data set that can be stopped and taken up again: the sums so far, in a file.

The file says what was analysed, by a fingerprint of the networks' parameters and of the question, and on what data, by
a digest of the batches gone through. Another network, another question or other data are refused.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resode.errors import InvalidInput
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

    def resume(self, data: Iterable[tuple[Tensor, Tensor]], tallies: Tallies) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``data`` that are still to be gone through; the sums of the others go into ``tallies``.

        Raises:
            InvalidInput: when the data are not those of the file.
        """
        for x, labels in data:
            if self.path is not None:
                self._digest = _digest(self._digest, x, labels)
            if self._held is not None and self.batches < self._held["batches"]:
                self.batches += 1
                if self.batches == self._held["batches"]:
                    self._take_up(tallies, labels.device)
                continue
            yield x, labels
            self.batches += 1
            self._save(tallies)
        if self._held is not None and self.batches < self._held["batches"]:
            raise InvalidInput(f"{self.path} is of {self._held['batches']} batches, and the data have {self.batches}")

    def finish(self) -> None:
        """The analysis is done: its result takes the place of the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _take_up(self, tallies: Tallies, device: torch.device) -> None:
        if self._digest != self._held["digest"]:
            raise InvalidInput(
                f"{self.path} is of other data (in another order, or other batches): give the same, or remove the file"
            )
        tallies.restore(self._held["tallies"], device)

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


def fingerprint(model: nn.Module | None, question: Any) -> str:
    """What tells one analysis from another: the parameters and buffers of ``model``, and the ``question`` (JSON)."""
    found = hashlib.sha256(json.dumps(question, sort_keys=True).encode())
    for name, tensor in ({} if model is None else model.state_dict()).items():
        found.update(name.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _digest(before: str, x: Tensor, labels: Tensor) -> str:
    return hashlib.sha256(before.encode() + _bytes(x) + _bytes(labels)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        found = held["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} is no progress of an analysis ({error}): remove it, or name another file"
        ) from error
    if found != expected:
        raise InvalidInput(
            f"{path} holds the progress of another analysis (another network, or other settings): remove it, or name "
            "another file"
        )
    return held
