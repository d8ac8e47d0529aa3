"""What does a solve cost, forward and backward, here and with torchdiffeq?

The field is time-conditioned 3×3 convolution – group norm – ReLU – the same again, on t in [0, 1], with the mean square
of the end state as loss. Two comparisons at the same solver, steps and evaluations of f: (a) the very same module,
which concatenates a time channel, handed to both; (b) each as its users write it: theirs concatenates, ours adds the
map t·K. The two take turns, after a warm-up; the ratio is of their medians. torchdiffeq's
"rk4" is the 3/8 rule: another tableau than ours, of the same order and the same four evaluations a step.

    python -m experiments.bench_ode cpu --publish results                   about 5 minutes on 2 CPU cores
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint

from experiments.common import main
from resode.blocks import Branch, ODEBlock
from resode.layers.conv import Conv2d
from resode.runs import Run
from resode.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark.

    Args:
        batch: images in a batch.
        shapes: channels and side of the square images.
        solvers: solver, and its steps (fixed grids) or its tolerance (dopri5).
        repetitions: measured solves of each, after a warm-up of two.
        device: cpu, cuda, cuda:1.
    """

    batch: int = 64
    shapes: tuple[tuple[int, int], ...] = ((64, 16), (16, 32))
    solvers: tuple[tuple[str, float], ...] = (("euler", 16), ("rk4", 8), ("dopri5", 1e-3))
    repetitions: int = 7
    device: str = "cpu"


CONFIGS = {
    "smoke": Config(batch=2, shapes=((8, 8),), solvers=(("euler", 2), ("dopri5", 1e-2)), repetitions=1),
    "cpu": Config(),
    "cuda": Config(repetitions=20, device="cuda"),
}


class Concatenating(nn.Module):
    """The layers of a branch, with the time channel concatenated before each convolution."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.layers = branch.layers
        joint = {
            str(i): nn.Parameter(torch.cat([layer.time_weight, layer.weight], dim=1).detach())
            for i, layer in enumerate(branch.layers)
            if isinstance(layer, Conv2d)
        }
        self.weights = nn.ParameterDict(joint)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Conv2d):
                channel = torch.ones_like(h[:, :1]) * t
                h = F.conv2d(torch.cat([channel, h], dim=1), self.weights[str(i)], padding=layer.padding)
            else:
                h = layer(h)
        return h


def ours(branch: nn.Module, solver: str, setting: float) -> Callable[[Tensor], Tensor]:
    """x ↦ h(1) by our ODE block."""
    if solver == "dopri5":
        return ODEBlock(branch, solver, rtol=setting, atol=setting)
    return ODEBlock(branch, solver, steps=int(setting))


def theirs(branch: nn.Module, solver: str, setting: float) -> Callable[[Tensor], Tensor]:
    """x ↦ h(1) by torchdiffeq."""
    options = {"rtol": setting, "atol": setting} if solver == "dopri5" else {"options": {"step_size": 1 / setting}}

    def solve(x: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0], device=x.device)
        return odeint(branch, x, times, method=solver, **options)[-1]

    return solve


def work(solve: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward pass, and its loss."""
    x = x.clone().requires_grad_()
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    loss = solve(x).square().mean()
    loss.backward()
    value = float(loss.detach())  # waits for the device
    return time.perf_counter() - begin, value


def compare(mine: Callable, other: Callable, x: Tensor, repetitions: int) -> dict[str, object]:
    """Both in turn: medians with their spread, the ratio of the medians, and how far the losses are apart."""
    for solve in (mine, other):
        for _ in range(2):
            work(solve, x)
    pairs = [(work(mine, x), work(other, x)) for _ in range(repetitions)]
    seconds = [[pair[i][0] for pair in pairs] for i in (0, 1)]
    losses = [pairs[0][i][1] for i in (0, 1)]
    return {
        "ours_seconds": _summary(seconds[0]),
        "torchdiffeq_seconds": _summary(seconds[1]),
        "ratio": median(seconds[1]) / median(seconds[0]),
        "ratio_of_pairs": _summary([b / a for a, b in zip(*seconds, strict=True)]),
        "loss_difference": abs(losses[0] - losses[1]) / abs(losses[1]),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def run(config: Config, out: Run) -> None:
    """Every solver at every shape, in both comparisons."""
    torch.manual_seed(0)
    rows = []
    for channels, side in config.shapes:
        branch = Branch(channels, Stack(norm="group"), "basic", "concat").to(config.device)
        concatenating = Concatenating(branch)
        x = torch.randn(config.batch, channels, side, side, device=config.device)
        for solver, setting in config.solvers:
            for table, mine in (("same module", concatenating), ("as written", branch)):
                found = compare(
                    ours(mine, solver, setting), theirs(concatenating, solver, setting), x, config.repetitions
                )
                rows.append({"table": table, "channels": channels, "side": side, "solver": solver, "setting": setting})
                rows[-1] |= found
                print(
                    f"{table:12s} {solver:7s} {setting:<6g} {channels:3d} × {side}²  "
                    f"ours {found['ours_seconds']['median']:.3f} s, torchdiffeq/ours {found['ratio']:.2f} "
                    f"({found['ratio_of_pairs']['min']:.2f}–{found['ratio_of_pairs']['max']:.2f}, "
                    f"n = {config.repetitions})",
                    flush=True,
                )
    out.save_result("bench", {"rows": rows})


if __name__ == "__main__":
    main("bench_ode", "What does a solve cost, here and with torchdiffeq?", CONFIGS, run)
