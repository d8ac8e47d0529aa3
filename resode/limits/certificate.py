"""The certificate: is this net near an ODE, and what is it like as a dynamics in depth?

=== ================== =================================================================== ===========================
 1  swap               other solvers and steps: logits, accuracy, order, critical steps    Ott et al. 2021
 2  reconstruction     forward, then backward: how much comes back                         Queiruga et al. 2020
 3  regularity         weights and increments from step to step, total variation           Cohen et al. 2021
 4  distance           states against those of the ODE, beside the bound of theory         Sander et al. 2022
 5  identity bias      variance of branch over shortcut, trained and at initialization     De & Smith 2020
 6  signal, lyapunov   norms of states and gradients, ways of the gradient, exponents      He et al. 2016, Veit et al.
=== ================== =================================================================== ===========================

Parts 3, 5 and 6 take any residual network. Parts 1, 2 and 4 take ODE blocks: a residual net is lifted
(``limits.lift``), so that its blocks are Euler's steps of what was lifted. The verdict rests on 1, 2 and 4.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from resode import plots
from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ode_blocks, solver_settings
from resode.blocks.settings import check_count
from resode.dynamics import ResidualDynamics, dynamics
from resode.dynamics.parts import Reader
from resode.errors import InvalidInput
from resode.limits.distance import Distance, distance
from resode.limits.flow import Flow, flow_of
from resode.limits.identity_bias import IdentityBias, identity_bias
from resode.limits.lyapunov import Lyapunov, lyapunov
from resode.limits.reconstruction import Reconstruction, reconstruction
from resode.limits.record import Record
from resode.limits.regularity import Regularity, regularity
from resode.limits.samples import Batches, Data, count, take
from resode.limits.signal import Signal, signal
from resode.limits.swap import Swap, swap
from resode.limits.verdict import Verdict, no_flow, verdict
from resode.nets.net import evaluating
from resode.train.recalibrate import recalibrate

T = TypeVar("T")
PARTS = 7


@dataclass(frozen=True)
class Certificate(Record):
    """What was found of a net; a part that could not be looked at is None, and ``missing`` says why.

    Args:
        count: samples used at most (the parts say how many each used).
        lifted: whether parts 1, 2 and 4 are of the net lifted from a residual net.
        verdict: near an ODE, not near, or that it cannot be told.
        swap, reconstruction, regularity, distance, bias, signal, lyapunov: the parts.
        initial_bias: the identity bias of the net before training; None if it was not given.
        missing: (part, why) for each that is None.
    """

    count: int
    lifted: bool
    verdict: Verdict
    swap: Swap | None
    reconstruction: Reconstruction | None
    regularity: Regularity
    distance: Distance | None
    bias: IdentityBias
    initial_bias: IdentityBias | None
    signal: Signal
    lyapunov: Lyapunov
    missing: tuple[tuple[str, str], ...]

    def plot(self, title: str = "") -> Figure:
        """A picture of all parts."""
        return plots.certificate(self.to_dict(), title)


def certificate(
    net: nn.Module,
    data: Data,
    *,
    initial: nn.Module | None = None,
    samples: int = 512,
    few: int = 64,
    directions: int = 4,
    dtype: torch.dtype | None = None,
    read: Reader | None = None,
    progress: bool = False,
) -> Certificate:
    """Look at a net as a dynamics in depth, and say whether it is near an ODE.

    All in evaluation mode; the net, its modes and its settings are left as they are.

    Args:
        net: an ODE net or a residual net; what :func:`resode.dynamics` reads.
        data: pairs (x, labels), gone through once, and no further than needed; held-out data.
        initial: the same net before training, for its identity bias. Its batch norms are recalibrated on the data, in a
            copy.
        samples: how many samples the solver swaps use.
        few: how many the other parts use; the Lyapunov exponents use an eighth of these.
        directions: how many Lyapunov exponents to find.
        dtype: look at a copy of the net of this type: float64 tells small errors from rounding.
        read: finds the parts of a model of another kind, as for :func:`resode.dynamics`.
        progress: show a progress bar (on a terminal).

    Raises:
        InvalidInput: for a network without residual steps, that cannot be read, or whose outputs are no numbers; a
            number below 1; or data that do not do.
    """
    for name, value in (("samples", samples), ("few", few), ("directions", directions)):
        check_count(value, name)
    batches = take(data, max(samples, few), dtype)
    net = net if dtype is None else copy.deepcopy(net).to(dtype)
    looked_at = take(batches, few)
    missing: dict[str, str] = {}
    _require_numbers(net, looked_at)
    with _bar(progress) as step:
        view, view_initial = _view(net, looked_at, read), _initial(initial, looked_at, dtype, read)
        found_regularity = step("regularity", lambda: regularity(view, looked_at, samples=few))
        bias = step("identity bias", lambda: identity_bias(view, looked_at, samples=few))
        initial_bias = None if view_initial is None else identity_bias(view_initial, looked_at, samples=few)
        found_signal = step("signal", lambda: signal(view, looked_at, samples=few))
        rates = step("lyapunov", lambda: lyapunov(view, looked_at, directions=directions, samples=-(-few // 8)))
        flow = _flow(net, missing)
        swapped = away = back = None
        if flow is None:
            told = no_flow(missing["swap"])
        else:
            swapped = step("solver swaps", lambda: swap(flow, batches, samples=samples))
            away = step("distance", lambda: distance(flow, looked_at, samples=few))
            back = step("reconstruction", lambda: _way_back(flow, looked_at, few, missing))
            told = verdict(swapped, away, back, missing.get("reconstruction", ""))
    return Certificate(
        count=count(batches),
        lifted=flow is not None and flow.lifted,
        verdict=told,
        swap=swapped,
        reconstruction=back,
        regularity=found_regularity,
        distance=away,
        bias=bias,
        initial_bias=initial_bias,
        signal=found_signal,
        lyapunov=rates,
        missing=tuple(missing.items()),
    )


def _require_numbers(net: nn.Module, batches: Batches) -> None:
    with evaluating(net), solver_settings(net, compile_mode=None):
        if not net(batches[0][0]).isfinite().all():
            raise InvalidInput("the net's outputs on the data are infinite or no numbers: there is nothing to look at")


def _flow(net: nn.Module, missing: dict[str, str]) -> Flow | None:
    """The net's own ODE blocks, or those of the lifted net; None, and why, where there is neither."""
    try:
        return flow_of(net)
    except InvalidInput as problem:
        missing.update(dict.fromkeys(("swap", "distance", "reconstruction"), str(problem)))
        return None


def _way_back(flow: Flow, batches: Batches, few: int, missing: dict[str, str]) -> Reconstruction | None:
    try:
        return reconstruction(flow, batches, samples=few)
    except InvalidInput as problem:
        missing["reconstruction"] = str(problem)
        return None


def _view(net: nn.Module, batches: Batches, read: Reader | None) -> ResidualDynamics:
    """The net as steps; where its solver's own are none (reversible, multistep), those of its tableau, or of rk4."""
    with ExitStack() as stack:
        for block in ode_blocks(net).values():
            other = {"solver": "rk4", "steps": block.grid_steps} if block.solver in MULTISTEP else {}
            stack.enter_context(solver_settings(block, gradient="backprop", compile_mode=None, **other))
        return dynamics(net, batches[0][0], read=read)


def _initial(
    net: nn.Module | None, batches: Batches, dtype: torch.dtype | None, read: Reader | None
) -> ResidualDynamics | None:
    if net is None:
        return None
    held = copy.deepcopy(net) if dtype is None else copy.deepcopy(net).to(dtype)
    recalibrate(held, batches)
    return _view(held, batches, read)


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[str, Callable[[], T]], T]]:
    """A bar that moves with every part."""
    with tqdm(total=PARTS, desc="certificate", leave=False, disable=None if progress else True) as bar:

        def step(name: str, part: Callable[[], T]) -> T:
            bar.set_postfix_str(name)
            found = part()
            bar.update()
            return found

        yield step
