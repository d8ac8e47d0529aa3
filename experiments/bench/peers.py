"""How each library is told to solve dh/dt = f(t, h) on [0, 1]: as its documentation and its users do it.

Every peer is imported in its own worker alone, and only there.
"""

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.work import FLOOR, OURS, WRITTEN, Work
from resode.blocks import Branch, ODEBlock
from resode.layers.conv import Conv2d
from resode.stack import Stack

Solve = Callable[[Tensor], Tensor]
"""x ↦ h(1)."""

IMPORTED = {OURS: "resode", "torchdiffeq": "torchdiffeq", "torchdyn": "torchdyn.numerics", "torchode": "torchode"}
CONVOLUTIONS = 2
"""Convolutions of f: an evaluation costs at least these."""


def load(peer: str) -> str:
    """Import ``peer``; its version.

    Raises:
        ImportError: when it, or something it needs, is not installed.
    """
    if peer == FLOOR:
        return torch.__version__
    importlib.import_module(IMPORTED[peer])
    try:
        return version(peer)
    except PackageNotFoundError:  # on the path without having been installed
        return "unknown"


class Concatenating(nn.Module):
    """The layers of a branch, with the time channel concatenated before each convolution, as Chen et al. 2018 do.

    ``t`` is a float, a tensor of no dimension or of one element, or one that spreads over the samples: (B, 1, 1, 1).
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_joined(layer) if isinstance(layer, Conv2d) else layer for layer in branch.layers)

    def forward(self, t: float | Tensor, h: Tensor) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                h = torch.cat([torch.ones_like(h[:, :1]) * t, h], dim=1)
            h = layer(h)
        return h


def _joined(conv: Conv2d) -> nn.Conv2d:
    """A plain convolution of [t, h], with the weights of ``conv``."""
    channels, out = conv.in_channels + 1, conv.out_channels
    joined = nn.Conv2d(channels, out, conv.kernel_size, padding=conv.padding, bias=conv.bias is not None)
    with torch.no_grad():
        joined.weight.copy_(joint(conv.time_weight, conv.weight))
        if conv.bias is not None:
            joined.bias.copy_(conv.bias)
    return joined


def joint(time_weight: Tensor, weight: Tensor) -> Tensor:
    """The weight (or gradient) of a convolution of [t, h] from those of t and of h."""
    return torch.cat([time_weight, weight], dim=1)


class Convolutions(nn.Module):
    """The floor: a chain of bare 3×3 convolutions, as many as ``evaluations`` of f have.

    The weights are near the identity, so that a long chain neither overflows nor underflows (denormals are slow).
    """

    def __init__(self, channels: int, evaluations: int) -> None:
        super().__init__()
        near = (nn.init.dirac_(torch.empty(channels, channels, 3, 3)) for _ in range(CONVOLUTIONS))
        noise = 0.01 / (9 * channels) ** 0.5
        self.weights = nn.ParameterList(w + noise * torch.randn(w.shape) for w in near)
        self.evaluations = evaluations

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.evaluations):
            for weight in self.weights:
                h = F.conv2d(h, weight, padding=1)
        return h


def field(work: Work) -> nn.Module:
    """f of the work: two time-conditioned 3×3 convolutions with group norm, and a ReLU between them."""
    torch.manual_seed(work.seed)  # every worker makes the same weights
    branch = Branch(work.problem.channels, Stack(norm="group"), "basic", "concat")
    return branch if work.peer == OURS and work.table == WRITTEN else Concatenating(branch)


def gradients(f: nn.Module) -> Iterator[Tensor]:
    """The gradients of the parameters, in one form and order for a branch and its :class:`Concatenating`."""
    for layer in f.layers:
        if isinstance(layer, Conv2d):
            yield joint(layer.time_weight.grad, layer.weight.grad)
            if layer.bias is not None:
                yield layer.bias.grad
        else:
            yield from (p.grad for p in layer.parameters())


def solver(work: Work, f: nn.Module, name: str | None = None) -> Solve:
    """x ↦ h(1) by the work's peer, with the solver ``name`` in place of the work's own."""
    makers = {OURS: _ours, "torchdiffeq": _torchdiffeq, "torchdyn": _torchdyn, "torchode": _torchode}
    return makers[work.peer](work, f, name or work.problem.solver)


def _ours(work: Work, f: nn.Module, name: str) -> Solve:
    settings: dict = {"gradient": work.gradient}
    if work.problem.steps is not None:
        settings["steps"] = work.problem.steps
    else:
        settings |= {"rtol": work.problem.tolerance, "atol": work.problem.tolerance}
    if work.compiled:
        settings["compile"] = work.compiled
    return ODEBlock(f, name, **settings)


def _torchdiffeq(work: Work, f: nn.Module, name: str) -> Solve:
    from torchdiffeq import odeint, odeint_adjoint

    integrate = odeint_adjoint if work.gradient == "adjoint" else odeint
    steps, tolerance = work.problem.steps, work.problem.tolerance
    control = {"options": {"step_size": 1 / steps}} if steps is not None else {"rtol": tolerance, "atol": tolerance}
    times = torch.tensor([0.0, 1.0], device=work.device)
    return lambda x: integrate(f, x, times, method=name, **control)[-1]


def _torchdyn(work: Work, f: nn.Module, name: str) -> Solve:
    # What torchdyn's NeuralODE calls; its own import needs Lightning.
    from torchdyn.numerics import odeint

    steps, tolerance = work.problem.steps, work.problem.tolerance
    if steps is None:
        times = torch.tensor([0.0, 1.0], device=work.device)
        return lambda x: odeint(f, x, times, name, atol=tolerance, rtol=tolerance)[1][-1]
    times = torch.linspace(0.0, 1.0, steps + 1, device=work.device)
    # Without save_at it would stack the states at all times.
    return lambda x: odeint(f, x, times, name, save_at=times[-1:])[1][-1]


def _torchode(work: Work, f: nn.Module, name: str) -> Solve:
    """States are (batch, features), times (batch,): features go in the order that the layout has in memory."""
    import torchode

    last = work.layout == "channels-last"
    size = (work.problem.channels, work.problem.side, work.problem.side)

    def flat(h: Tensor) -> Tensor:
        return (h.permute(0, 2, 3, 1) if last else h).flatten(1)

    def image(h: Tensor) -> Tensor:
        return h.unflatten(1, (*size[1:], size[0])).permute(0, 3, 1, 2) if last else h.unflatten(1, size)

    term = torchode.ODETerm(lambda t, h: flat(f(t[:, None, None, None], image(h))))
    steps, tolerance = work.problem.steps, work.problem.tolerance
    start, end = (torch.full((work.batch,), t, device=work.device) for t in (0.0, 1.0))
    if steps is not None:
        adjoint = torchode.AutoDiffAdjoint(torchode.Euler(term), torchode.FixedStepController())
        first = torch.full((work.batch,), 1 / steps, device=work.device)
    else:
        control = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term), control).to(work.device)
        first = None

    def solve(x: Tensor) -> Tensor:
        batch = len(x)
        problem = torchode.InitialValueProblem(flat(x), t_start=start[:batch], t_end=end[:batch])
        return image(adjoint.solve(problem, dt0=None if first is None else first[:batch]).ys[:, -1])

    return solve
