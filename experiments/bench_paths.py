"""What do single deletions and exact path spectra cost, beside the naive ways to them?

*Lesions.* Every identity block of ResNet-110 is deleted, one at a time. Naively each deletion is a forward pass of the
model with its shortcut in place of the block. Here all fork from the running baseline; on the model's view as it is, on
a copy made for speed (batch norms folded, channels-last, sums in place), and on one in bfloat16. First the logits of
all networks are compared; evaluations of a block are counted.

*Spectrum.* The exact spectrum of ResNet-56 (28 parts), on the net as it is and on a copy made for speed, beside one
forward and backward pass (parameter gradients included), and beside 16 sampled paths of each length: by
``spectrum.sampled``, which shares one forward pass, and one by one. The gradient, as the sum of the parts, is compared
first; the copy's differs where a rounding error lets a ReLU switch.

*Memory.* By how much a few deletions, and all, lift the peak of a fresh process: what is kept does not grow with them.

All ways take turns, one repetition at a time, after one that is not measured; a ratio is of medians, with the smallest
and the largest ratio within a round. Weights are random, and the statistics of batch norm those of three batches.

    python -m experiments.bench_paths cpu --publish results     about 5 minutes on 2 CPU cores
    python -m experiments.bench_paths cuda --publish results    on a GPU, where lesioned networks are stacked in a batch
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from experiments.bench import lesions, spectra, turns
from experiments.bench.lesions import NAIVE, Subject
from experiments.bench.spectra import EXACT, GRADIENT
from experiments.common import main
from resode.errors import ResodeError
from resode.runs import Run

CLOSE = {"float32": 1e-5, "bf16": 2e-2}
"""Largest relative distance of logits from the naive ones."""
GRADIENT_CLOSE = 2e-2
"""Of a gradient: a ReLU that a rounding error switches changes it by more than rounding."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark.

    Args:
        depth: depth 6n + 2 of the net whose blocks are deleted.
        batch: images on which they are.
        spectrum_depth: depth 6n + 2 of the net whose spectrum is found.
        spectrum_batch: images on which it is.
        width: channels of the first stage.
        side: of the square images.
        samples: paths sampled of each length.
        few: deletions whose peak memory is compared with that of all.
        streams: lesioned networks stacked in the batch; None: what lesion.single chooses.
        repetitions: measured rounds.
        lead_in: unmeasured repetitions at the start of each turn (a GPU lowers its clock while others have theirs).
        seed: of weights, images and paths.
        device: cpu, cuda, cuda:1.
    """

    depth: int = 110
    batch: int = 64
    spectrum_depth: int = 56
    spectrum_batch: int = 16
    width: int = 16
    side: int = 32
    samples: int = 16
    few: int = 4
    streams: int | None = None
    repetitions: int = 3
    lead_in: int = 0
    seed: int = 0
    device: str = "cpu"

    def subject(self, depth: int, batch: int) -> Subject:
        return Subject(depth=depth, width=self.width, side=self.side, batch=batch, seed=self.seed, device=self.device)


CONFIGS = {
    "smoke": Config(
        depth=14, batch=4, spectrum_depth=8, spectrum_batch=2, width=4, side=8, samples=2, few=1, repetitions=1
    ),
    "cpu": Config(),
    "cuda": Config(batch=128, spectrum_batch=128, repetitions=5, lead_in=1, device="cuda"),
}


class Differs(ResodeError, ArithmeticError):
    """A way with another answer: its time is of no meaning."""


def run(config: Config, out: Run) -> None:
    """All ways to the lesions and to the spectrum, their ratios, peak memory, and a table of these.

    Raises:
        Differs: at the end, with the results saved, when an answer is another than that of the naive way.
    """
    subjects = {
        "lesions": config.subject(config.depth, config.batch),
        "spectrum": config.subject(config.spectrum_depth, config.spectrum_batch),
    }
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tqdm(desc="bench", unit="turn", leave=False, disable=None) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        rounds = (config.device, config.repetitions, config.lead_in, tick)
        made = lesions.ways(subjects["lesions"], config.streams)
        rows = turns.rows(made, lesions.largest_distance, *rounds)
        turns.relate(rows, NAIVE, "to_naive")
        found["lesions"] = {"net": subjects["lesions"].name, "rows": rows}
        rows = turns.rows(spectra.ways(subjects["spectrum"], config.samples), spectra.distance, *rounds)
        turns.relate(rows, GRADIENT, "to_gradient")
        turns.relate(rows, EXACT, "to_exact")
        found["spectrum"] = {"net": subjects["spectrum"].name, "rows": rows}
        found["memory"] = memory(config, subjects["lesions"], made[1].about["streams"], tick)
    said = table(found)
    out.save_result("bench", found)
    out.write("table.md", said)
    print(said)
    if wrong := list(faults(found)):
        raise Differs(f"{'; '.join(wrong)} (the results are in {out.path})")


def memory(config: Config, subject: Subject, streams: int, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for a few deletions, and one for all, each from a process of its own; with as many streams for both."""
    streams = min(streams, config.few)
    rows = []
    for deletions in (config.few, None):
        tick("memory")
        with _returning_memory(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak = pool.submit(lesions.peak, replace(subject), deletions, streams).result()  # without the net it made
        there = len(lesions.identity_blocks(subject.net))
        rows.append({"deletions": there if deletions is None else deletions, "streams": streams, "peak_mib": peak})
    return rows


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Processes started here return what they free at once: glibc's heap keeps some, which varies from run to run."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**16)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def faults(found: Mapping[str, Any]) -> Iterator[str]:
    """Which answers are too far from the naive way's."""
    for question in ("lesions", "spectrum"):
        for row in found[question]["rows"]:
            close = CLOSE[row["precision"]] if question == "lesions" else GRADIENT_CLOSE
            if not row.get("distance", 0.0) <= close:
                yield f"{question}, {row['way']}: its answer is off by {row['distance']:.1e}"


def table(found: Mapping[str, Any]) -> str:
    """All of it, in Markdown."""
    lines = [f"### Single deletions: {found['lesions']['net']}", ""]
    lines += ["| way | arithmetic | evaluations | streams | logits off by | seconds (range, n) | × as fast as naive |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in found["lesions"]["rows"]:
        cells = [row["way"], row["arithmetic"], row["evaluations"], row["streams"], _off(row), _seconds(row)]
        lines.append(_line([*cells, _ratio(row["to_naive"])]))
    lines += ["", f"### Path spectrum: {found['spectrum']['net']}", ""]
    lines += ["| way | gradient off by | seconds (range, n) | cost in forward and backward passes | cost of exact |"]
    lines += ["|---|---|---|---|---|"]
    for row in found["spectrum"]["rows"]:
        costs = [_inverse(row["to_gradient"]), _inverse(row["to_exact"])]
        lines.append(_line([row["way"], _off(row), _seconds(row), *costs]))
    lines += ["", "### Peak memory of single deletions", "", "| deletions | streams | MiB |", "|---|---|---|"]
    lines += [_line([row["deletions"], row["streams"], f"{row['peak_mib']:.0f}"]) for row in found["memory"]]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _off(row: Mapping[str, Any]) -> str:
    return f"{row['distance']:.1e}" if "distance" in row else ""


def _seconds(row: Mapping[str, Any]) -> str:
    said = row["seconds"]
    return f"{said['median']:.3g} ({said['min']:.3g}–{said['max']:.3g}, {said['n']})"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def _inverse(found: Mapping[str, float]) -> str:
    return f"{1 / found['ratio']:.2f} ({1 / found['max']:.2f}–{1 / found['min']:.2f})"


if __name__ == "__main__":
    main("bench_paths", "What do single deletions and exact path spectra cost?", CONFIGS, run)
