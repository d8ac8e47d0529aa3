"""Ways to one answer, measured in turns: first the answers are compared, then everyone has a turn in every round."""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bench.summary import ratio, spread


@dataclass(frozen=True)
class Way:
    """One way to an answer.

    Args:
        name: what to call it.
        answer: computes it: one tensor, whatever the way; None for a way to something else, which is only timed.
        about: what else its row says.
    """

    name: str
    answer: Callable[[], Tensor | None]
    about: Mapping[str, Any]


def rows(
    ways: Sequence[Way],
    distance: Callable[[Tensor, Tensor], float] | None,
    device: str,
    repetitions: int,
    lead_in: int,
    tick: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each way: the distance of its answer from that of the first, and its seconds, in all and by round.

    Args:
        ways: the first is the reference.
        distance: of an answer from the reference; None where no way answers.
        repetitions: rounds in which each way is measured once. The comparison before them is everyone's warm-up.
        lead_in: unmeasured repetitions at the start of each turn (a GPU lowers its clock while others have theirs).
        tick: is told of each turn.
    """
    found: list[dict[str, Any]] = [{"way": way.name, **way.about} for way in ways]
    reference: Tensor | None = None
    for way, row in zip(ways, found, strict=True):
        tick(f"{way.name}, answers")
        with exact_products(device):
            answer = way.answer()
        if answer is not None:
            reference = answer if reference is None else reference
            row["distance"] = distance(answer, reference)
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(repetitions):
        for way, those in zip(ways, taken, strict=True):
            tick(way.name)
            for _ in range(lead_in):
                way.answer()
            those.append(seconds(way.answer, device))
    for row, those in zip(found, taken, strict=True):
        row |= {"seconds": spread(those), "rounds": those}
    return found


def relate(found: Sequence[dict[str, Any]], to: str, key: str) -> None:
    """Write into each row under ``key`` the seconds of the way called ``to`` over its own."""
    other = next(row for row in found if row["way"] == to)
    for row in found:
        row[key] = ratio(other, row)


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call."""
    gc.collect()  # not when it likes to
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def wait(device: str) -> None:
    """Until the device has done all that it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def exact_products(device: str) -> contextlib.AbstractContextManager:
    """Convolutions in full float32, to compare answers by: a GPU's own way is tf32."""
    if torch.device(device).type == "cuda":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return contextlib.nullcontext()
