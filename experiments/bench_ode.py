"""What does a solve cost, forward and backward, here and with torchdiffeq, torchdyn and torchode?

The field is time-conditioned 3×3 convolution – group norm – ReLU – the same again, on t in [0, 1], with the mean square
of the end state as loss. Two tables: (a) *same module*: the very same module, which concatenates a time channel, is
handed to every solver: what the solver costs; (b) *as written*: each as its users write it, theirs concatenates, ours
adds the map t·K, compiles, or saves memory: what the user gets.

Each peer works in a process of its own, and they take turns, one repetition at a time, so that only one computes. All
are measured with the state contiguous and channels-last. The floor is the bare convolutions of f, as many as the solve
evaluates, forward and backward, in the faster layout. First the gradients are compared: torchdiffeq's "rk4" is the 3/8
rule, so ours is compared as "rk4-38" and timed as "rk4", which costs the same. Peak memory is measured in fresh
processes: by how much one forward and backward pass lifts it.

Peers that are not installed are skipped, and named. torchdyn and torchode ask for versions of other packages that do
not go with ours, so they are installed beside them (or all by ``make bench``):

    pip install '.[bench]'
    pip install --no-deps torchdyn==1.0.6 torchode==1.0.1 torchtyping==0.1.5
    python -m experiments.bench_ode cpu --publish results                   about 15 minutes on 2 CPU cores
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, Literal

import torch
from tqdm import tqdm

from experiments.bench.rounds import faults, measure
from experiments.bench.summary import relate, summarize, table
from experiments.bench.work import LAYOUTS, PEERS, SAME, WRITTEN, Case, Problem, checkpoint, compared, reversible, turns
from experiments.bench.workers import Crew, WorkerError
from experiments.common import main
from resode.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark.

    Args:
        batch: images in a batch.
        same: problems of table (a), the same module.
        written: problems of table (b), each as its users write it.
        checkpoint: problems solved at little memory: ours with checkpoints, torchdiffeq's with the adjoint.
        reversible: problems solved with backpropagation and, at equal NFE, reversibly.
        few, many: steps between which the growth of a reversible solve's memory is measured.
        peers: whom to compare with, where installed: torchdiffeq, torchdyn, torchode.
        repetitions: measured solves of each.
        warmups: unmeasured solves of each, after those that compare gradients and count evaluations.
        lead_in: unmeasured solves at the start of each turn (a GPU lowers its clock while others have theirs).
        seed: of the weights.
        device: cpu, cuda, cuda:1.
    """

    batch: int = 64
    same: tuple[Problem, ...] = (
        Problem(solver="euler", steps=16, channels=64, side=16),
        Problem(solver="euler", steps=16, channels=16, side=32),
        Problem(solver="rk4", steps=8, channels=64, side=16),
        Problem(solver="rk4", steps=8, channels=16, side=32),
        Problem(solver="dopri5", tolerance=1e-3, channels=64, side=16),
        Problem(solver="dopri5", tolerance=1e-3, channels=16, side=32),
    )
    written: tuple[Problem, ...] = (
        Problem(solver="rk4", steps=8, channels=64, side=16),
        Problem(solver="rk4", steps=8, channels=64, side=16, precision="bf16", compiled=("default",)),
        Problem(solver="euler", steps=16, channels=16, side=32),
        Problem(solver="dopri5", tolerance=1e-3, channels=64, side=16, compiled=("default",)),
        Problem(solver="dopri5", tolerance=1e-3, channels=16, side=32, compiled=("default",)),
    )
    checkpoint: tuple[Problem, ...] = (Problem(solver="dopri5", tolerance=1e-3, channels=64, side=16),)
    reversible: tuple[Problem, ...] = (Problem(solver="rk4", steps=8, channels=64, side=16),)
    few: int = 8
    many: int = 64
    peers: tuple[Literal["torchdiffeq", "torchdyn", "torchode"], ...] = PEERS
    repetitions: int = 5
    warmups: int = 1
    lead_in: int = 0
    seed: int = 0
    device: str = "cpu"


CONFIGS = {
    "smoke": Config(
        batch=2,
        same=(Problem(solver="euler", steps=2, channels=8, side=8),),
        written=(
            Problem(solver="rk4", steps=1, channels=8, side=8),
            Problem(solver="dopri5", tolerance=1e-3, channels=8, side=8),
        ),
        checkpoint=(),
        reversible=(),
        repetitions=1,
        warmups=0,
    ),
    "cpu": Config(),
    "cuda": Config(
        written=tuple(replace(problem, compiled=("default", "reduce-overhead")) for problem in Config.written),
        repetitions=20,
        warmups=4,  # of these CUDA graphs take two to be recorded
        lead_in=1,
        device="cuda",
    ),
}


def cases(config: Config, peers: Sequence[str]) -> list[Case]:
    """All comparisons of ``config`` with ``peers``."""
    common = {"batch": config.batch, "seed": config.seed, "device": config.device}
    found = [compared(SAME, problem, common, peers, LAYOUTS) for problem in config.same]
    found += [compared(WRITTEN, problem, common, peers, LAYOUTS) for problem in config.written]
    found += [checkpoint(problem, common, peers) for problem in config.checkpoint]
    return found + [reversible(problem, common, config.few, config.many) for problem in config.reversible]


def run(config: Config, out: Run) -> None:
    """Every case, its rows, their ratios, and a table of both.

    Raises:
        WorkerError: when a worker dies; and at the end, with the results saved, when ours could not do a piece of work,
            a gradient is another, or f was evaluated another number of times on the same grid.
    """
    rows: list[dict[str, Any]] = []
    with Crew(config.peers) as crew:
        for peer, why in crew.absent.items():
            print(f"{peer} is skipped: {why}", flush=True)
        todo = cases(config, [peer for peer in config.peers if peer in crew])
        with tqdm(total=turns(todo, config.repetitions), desc="bench", unit="turn", leave=False, disable=None) as bar:

            def tick(label: str) -> None:
                bar.set_postfix_str(label, refresh=False)
                bar.update()

            for i, case in enumerate(todo):
                bar.write(f"[{i + 1}/{len(todo)}] {case.table}: {case.name}")
                rows += measure(case, crew, config.repetitions, config.warmups, config.lead_in, tick)
    relate(rows)
    summary = summarize(rows)
    said = table(rows, summary, crew.absent)
    found = {
        "peers": {peer: crew.versions.get(peer) for peer in config.peers},
        "absent": crew.absent,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "summary": summary,
    }
    out.save_result("bench", found)
    out.write("table.md", said)
    print(said)
    if wrong := faults(rows):
        said = "; ".join(shorten(fault, 160) for fault in wrong)
        raise WorkerError(f"{len(wrong)} rows are wrong (the results in {out.path} say more): {said}")


if __name__ == "__main__":
    main("bench_ode", "What does a solve cost, here and with torchdiffeq, torchdyn and torchode?", CONFIGS, run)
