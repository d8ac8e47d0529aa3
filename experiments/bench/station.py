"""What a worker does: prepare pieces of work, repeat them when it is its turn, and measure time and memory."""

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench import peers
from experiments.bench.work import FLOOR, OURS, Work
from resode.blocks.compiled import begin_graphs

MIB = 2**20


class Bench:
    """A piece of work, ready to be repeated: its module f, the solve x ↦ h(1), and x."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.f = self._field().to(work.device)
        if work.layout == "channels-last":
            self.f.to(memory_format=torch.channels_last)
        self.solve: peers.Solve = self.f if work.peer == FLOOR else peers.solver(work, self.f)
        self.x = self.input(work.batch, work.problem.side)

    def _field(self) -> nn.Module:
        if self.work.peer != FLOOR:
            return peers.field(self.work)
        torch.manual_seed(self.work.seed)
        chain = peers.Convolutions(self.work.problem.channels, self.work.evaluations)
        return chain.to(torch.bfloat16) if self.work.problem.precision == "bf16" else chain

    def input(self, batch: int, side: int) -> Tensor:
        """x, the same in every worker."""
        x = torch.randn(batch, self.work.problem.channels, side, side, generator=torch.Generator().manual_seed(1))
        x = x.to(self.work.device)
        if self.work.peer == FLOOR and self.work.problem.precision == "bf16":
            x = x.to(torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last) if self.work.layout == "channels-last" else x

    def start(self, x: Tensor | None = None) -> Tensor:
        """A leaf to start from, without the gradients of the time before."""
        self.f.zero_grad(set_to_none=True)
        begin_graphs(self.work.compiled, self.x.device)
        return (self.x if x is None else x).detach().requires_grad_()

    def once(self, x: Tensor, solve: peers.Solve | None = None) -> Tensor:
        """One forward and backward pass; the loss."""
        loss = self.forward(x, solve)
        loss.backward()
        return loss.detach()

    def forward(self, x: Tensor, solve: peers.Solve | None = None) -> Tensor:
        """The loss: the mean square of h(1)."""
        with self.precision():
            return (solve or self.solve)(x).float().square().mean()

    def precision(self) -> contextlib.AbstractContextManager:
        """Autocast, for work in bf16; the floor's tensors are bf16 themselves."""
        wanted = self.work.problem.precision == "bf16" and self.work.peer != FLOOR
        device = torch.device(self.work.device).type
        return torch.autocast(device, torch.bfloat16) if wanted else contextlib.nullcontext()

    def seconds(self) -> float:
        """Wall-clock time of one forward and backward pass."""
        x = self.start()
        gc.collect()  # not when it likes to
        self.wait()
        begin = time.perf_counter()
        self.once(x)
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def counted(self) -> dict[str, Any]:
        """One pass, with its loss and the evaluations of f, forward and backward."""
        x = self.start()
        with evaluations(self.f) as count:
            loss = self.forward(x)
            forward = count[0]
            loss.backward()
        found = {"loss": float(loss.detach()), "nfe_forward": forward, "nfe_backward": count[0] - forward}
        if self.work.peer == OURS:  # its own counters: compiled code calls no hooks
            found |= {key: getattr(self.solve.stats, key) for key in ("nfe_forward", "nfe_backward")}
        return found

    def gradient(self) -> np.ndarray:
        """∂L/∂x and ∂L/∂θ in one vector, by the solver whose tableau the others have, in full float32."""
        same = self.work.twin == self.work.problem.solver
        solve = self.solve if same else peers.solver(self.work, self.f, self.work.twin)
        x = self.start()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.once(x, solve)
        parts = (x.grad.contiguous(), *peers.gradients(self.f))
        return torch.cat([part.flatten() for part in parts]).float().cpu().numpy()


@contextlib.contextmanager
def evaluations(f: nn.Module) -> Iterator[list[int]]:
    """Count the calls of ``f``: a list of one number."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    hook = f.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


class Station:
    """The commands that a worker answers."""

    def __init__(self) -> None:
        self.benches: list[Bench] = []
        gc.freeze()  # what was imported stays: collecting garbage need not look at it

    def prepare(self, work: Work, warmups: int) -> dict[str, Any]:
        """Make ``work`` ready as one more bench: check, count, warm up; what was found."""
        bench = Bench(work)
        found: dict[str, Any] = {}
        if work.peer != FLOOR:
            found = {"gradient": bench.gradient(), **bench.counted()}
        for _ in range(warmups):
            bench.seconds()
        bench.f.zero_grad(set_to_none=True)
        self.benches.append(bench)
        return {"bench": len(self.benches) - 1, **found}

    def repeat(self, bench: int, lead_in: int) -> float:
        """Seconds of one more repetition, after ``lead_in`` unmeasured ones."""
        for _ in range(lead_in):
            self.benches[bench].seconds()
        taken = self.benches[bench].seconds()
        self.benches[bench].f.zero_grad(set_to_none=True)
        return taken

    def clear(self) -> None:
        """Forget the benches."""
        if any(bench.work.compiled for bench in self.benches):
            torch.compiler.reset()
        self.benches.clear()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def memory(self, work: Work) -> dict[str, Any]:
        """By how many MiB one pass lifts the peak of what this process holds; to be asked of a fresh process."""
        bench = Bench(work)
        # What is set up at the first use of anything shall not count: a pass on tiny images.
        bench.once(bench.start(bench.input(2, 4)), _small(bench))
        x = bench.start()
        bench.wait()
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            bench.once(x)
            bench.wait()
            peak = torch.cuda.max_memory_allocated(x.device)
        else:
            before = start_peak()
            bench.once(x)
            peak = peak_rss()
        return {"peak_mib": (peak - before) / MIB}


def _small(bench: Bench) -> peers.Solve:
    """The same solve for images of side 4 (torchode's knows the side)."""
    work = replace(bench.work, problem=replace(bench.work.problem, side=4))
    return peers.solver(work, bench.f)


def start_peak() -> int:
    """Start a new peak of the resident memory where the system can; the bytes held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return rss()


def rss() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()


def peak_rss() -> int:
    """The largest number of bytes held.

    On Linux not ``ru_maxrss``: it survives exec, so that a worker would start with the peak of its parent.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else 0


def _unit() -> int:
    return 1 if sys.platform == "darwin" else 1024


def arithmetic(device: str, precision: str) -> str:
    """What the device computes products with, such as "amx_bf16" or "avx512"."""
    if torch.device(device).type == "cuda":
        if precision == "bf16":
            return "bf16 tensor cores" if torch.cuda.is_bf16_supported() else "bf16, emulated"
        return "tf32 convolutions" if torch.backends.cudnn.allow_tf32 else "float32"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if precision != "bf16":
        return capability
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in _cpu_flags()), f"{capability}, no bf16")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())
