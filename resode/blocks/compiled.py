"""Compiled steps: the evaluations and sums of one solver step as one graph of torch.compile's.

A step is traced once for each kind of call (shapes, types, modes; see ``Compiler._signature``) as a function of
tensors alone: the state, t and t + Δ, the parameters, buffers and other tensors that the modules of the branch hold,
and what the context of the solve holds (masks, maps t·K, standardized weights). Nothing of one solve is part of the
graph, so later steps and solves of the same kind run it as it is, and no number that changes (a time, a step size, a
counter of evaluations) compiles it again. The batch moments that are met are outputs. The traced step is compared
with the step it was traced from before it is used. Transforms of torch.func and forward mode run the steps as they
are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from resode.blocks.solvers import Solve, State, Trial, rk_step, stage_time
from resode.blocks.tableaux import Tableau
from resode.errors import InvalidInput
from resode.layers import kernels
from resode.layers.context import DerivedInput, Draw, Field, MaskInput, Moments, SolveContext

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of torch.compile."""
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Those of them whose kernels are recorded in CUDA graphs, on a GPU."""

TOLERANCE = 2e-3
"""How far, relative to its norm, a traced step may be from the eager one; 8 roundings, where these are more."""


def begin_graphs(mode: str | bool | None, device: torch.device) -> None:
    """Say that a step of training begins, or an evaluation: CUDA graphs may write over what they computed before.

    By itself torch takes each call of a compiled function for such a beginning, once no backward pass is pending; so it
    would write over the states of a solve whose steps are graphs of their own while the solve still needs them. Where
    it was told once, it waits to be told again.

    Args:
        mode: torch.compile's mode (True: the default one), or None or False; it matters whether it has CUDA graphs.
        device: where the graphs run.
    """
    if mode in CUDA_GRAPHS and device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


class Compiler:
    """Compiles the steps of one block, and keeps them; a copy of the block starts with none.

    Args:
        mode: torch.compile's mode ("default", "reduce-overhead", "max-autotune").
    """

    def __init__(self, mode: str = "default") -> None:
        self.mode = mode
        self.held: dict[object, _Compiled] = {}
        self.moving: set[object] = set()
        """Names of attributes that an evaluation of the branch changes: counters, no settings."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiler":
        return Compiler(self.mode)

    def __reduce__(self) -> tuple[type["Compiler"], tuple[str]]:
        return Compiler, (self.mode,)

    def step(
        self,
        f: Solve,
        tableau: Tableau,
        t: float,
        end: float,
        state: State,
        *,
        first: State | None = None,
        base: State | None = None,
        sign: float = 1.0,
        control: bool = False,
        reused: bool = False,
    ) -> Trial:
        """As :func:`rk_step`."""

        def make(g: Solve, t: Any, end: Any, state: State, first: State | None, base: State | None) -> Trial:
            return rk_step(g, tableau, t, end, state, first=first, base=base, sign=sign, control=control, reused=reused)

        # Without gradients f at the end costs the same whether it is used or not: one graph does for both.
        reused = reused or not torch.is_grad_enabled()
        times = [stage_time(t, end, c) for c in tableau.c]
        kind = (tableau.name, sign, control, reused)
        return self._run(f, kind, make, times if first is None else times[1:], (t, end), (state, first, base))

    def slopes(self, f: Solve, t: float, state: State) -> State:
        """The slopes at (t, state)."""

        def make(g: Solve, t: Any, end: Any, state: State, *_: None) -> Trial:
            return Trial(g(t, state))

        return self._run(f, ("slopes",), make, [t], (t, t), (state, None, None)).state

    def _run(
        self,
        f: Solve,
        kind: tuple[object, ...],
        make: Callable[..., Trial],
        times: Sequence[float],
        ends: tuple[float, float],
        states: tuple[State, State | None, State | None],
    ) -> Trial:
        if kernels.transformed():
            return make(f, *ends, *states)
        known = self.held.get((self.mode, kind, self._signature(f, states)))
        if known is not None:
            return known(f, times, ends, states)
        before, f.context.inputs = _settings(f.branch), {}
        try:
            trial = make(f, *ends, *states)
            inputs = f.context.inputs
        finally:
            f.context.inputs = None
        after = _settings(f.branch)
        self.moving |= {name for name, value in after.items() if name not in before or before[name] != value}
        f.described = None
        traced = _trace(f, make, inputs, ends, states)
        traced.check(f, trial, ends, states)
        traced.graph = torch.compile(traced.graph, dynamic=False, fullgraph=True, mode=self.mode)
        self.held[self.mode, kind, self._signature(f, states)] = traced
        return trial

    def _signature(self, f: Solve, states: Sequence[State | None]) -> tuple[object, ...]:
        """All that a traced step depends on but the values of its tensors."""
        if f.described is None:  # settings of the branch's modules do not change within a solve
            training = {(i, "training"): f.context.is_training(m) for i, m in enumerate(_modules(f.branch))}
            held = {**_settings(f.branch), **training}  # as the solve goes on with, whatever the modules are by now
            f.described = tuple(item for item in held.items() if item[0] not in self.moving)
        return (
            f.described,
            f.dtype,
            f.integrands is None or (f.integrands.kinetic, f.integrands.jacobian),
            tuple(None if state is None else tuple(_layout(part) for part in state) for state in states),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _autocast(states),
            f.context.recording,
        )


def _settings(branch: Field) -> dict[object, object]:
    """What the modules of ``branch`` hold besides parameters, buffers and modules, by the name of its place."""
    return {
        (i, name): _frozen(value)
        for i, module in enumerate(_modules(branch))
        for name, value in vars(module).items()
        if name not in _OF_MODULES
    }


_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


def _modules(branch: Field) -> list[nn.Module]:
    return list(branch.modules()) if isinstance(branch, nn.Module) else []


def _frozen(value: object) -> object:
    """``value`` as part of a key: equal as long as a graph that was traced with it holds.

    It looks into containers and one level into objects; a value that changes deeper than that is not seen to.
    """
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, dict):
        return dict, tuple((_frozen(key), _frozen(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(held) for held in value)
    if isinstance(value, set):
        return set, frozenset(value)
    if isinstance(value, np.ndarray):
        return np.ndarray, value.shape, value.dtype.str, value.tobytes()
    if type(value).__hash__ is object.__hash__ and not callable(value):  # told apart by identity, and can change
        return id(value), tuple((name, repr(held)) for name, held in getattr(value, "__dict__", {}).items())
    try:
        hash(value)
    except TypeError:
        return type(value)
    return value


def _hung(branch: Field) -> list[tuple[nn.Module, str]]:
    """The places of the tensors that modules of ``branch`` hold as plain attributes."""
    return [(m, name) for m in _modules(branch) for name, value in vars(m).items() if isinstance(value, Tensor)]


def _autocast(states: Sequence[State | None]) -> tuple[bool, torch.dtype]:
    device = states[0][0].device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _layout(x: Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


@dataclass
class _Shape:
    """How the outputs of a traced step are told apart: found while it is traced."""

    state: int = 0
    error: int = 0
    last: int = 0
    moments: list[tuple[Any, int]] = field(default_factory=list)
    """The layers that met batches, each with the number of the evaluation."""
    evaluations: int = 0


class _TracedContext(SolveContext):
    """The context of a step that is traced: all it holds are inputs of the graph."""

    def __init__(self, real: SolveContext, held: dict[MaskInput | DerivedInput, Tensor], shape: _Shape) -> None:
        super().__init__(real.t0, real.t1)
        self.real, self.held, self.shape = real, held, shape
        self.recording = real.recording
        self.met: list[Tensor] = []

    def evaluate(self, branch: Callable[..., Tensor], t: Any, h: Tensor) -> Tensor:
        self.shape.evaluations += 1
        return super().evaluate(branch, t, h)

    def is_training(self, module: nn.Module) -> bool:
        return self.real.is_training(module)

    def mask(self, module: object, draw: Draw, like: Tensor) -> Tensor:
        use = self._uses.get(module, 0)
        self._uses[module] = use + 1
        return self.held[MaskInput(module, use)]

    def derive(self, module: nn.Module, name: object, make: Callable[[], Tensor]) -> Tensor:
        return make() if self.weights_vary else self.held[DerivedInput(module, name)]

    def record(self, moments: Moments) -> None:
        if self.recording:
            self.shape.moments.append((moments.layer, self.shape.evaluations - 1))
            self.met += [moments.mean, moments.variance]


@dataclass
class _Compiled:
    """A traced step: its graph, the inputs it takes from a context, and the shape of its outputs."""

    graph: Callable[..., Sequence[Tensor]]
    inputs: dict[MaskInput | DerivedInput, Any]
    shape: _Shape

    def arguments(self, f: Solve, ends: tuple[float, float], states: Sequence[State | None]) -> list[Tensor]:
        like = states[0][0]
        clock = (*ends, f.context.interval_time(ends[0]))
        times = [torch.full((), value, dtype=like.dtype, device=like.device) for value in clock]
        parts = [part for state in states if state is not None for part in state]
        own = [*f.branch.parameters(), *f.branch.buffers(), *(getattr(m, name) for m, name in _hung(f.branch))]
        return [*times, *parts, *own, *(_resolve(f.context, name, how) for name, how in self.inputs.items())]

    def run(self, f: Solve, ends: tuple[float, float], states: Sequence[State | None]) -> list[Tensor]:
        arguments = self.arguments(f, ends, states)
        device, (cast, _) = states[0][0].device.type, _autocast(states)
        # The casts of the autocast under which it was traced are operations of the graph.
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            return list(self.graph(*arguments))

    def __call__(
        self, f: Solve, times: Sequence[float], ends: tuple[float, float], states: Sequence[State | None]
    ) -> Trial:
        out = self.run(f, ends, states)
        f.count(self.shape.evaluations)
        cut = [self.shape.state, self.shape.error, self.shape.last]
        state, error, last = (tuple(out[sum(cut[:i]) : sum(cut[: i + 1])]) for i in range(3))
        met = out[sum(cut) :]
        for i, (layer, evaluation) in enumerate(self.shape.moments):
            f.context.record(Moments(layer, times[evaluation], met[2 * i].detach(), met[2 * i + 1].detach()))
        return Trial(state, error or None, last or None)

    def check(self, f: Solve, trial: Trial, ends: tuple[float, float], states: Sequence[State | None]) -> None:
        """Check that the traced step is the eager one, in its values and its gradients.

        Raises:
            InvalidInput: when it is not: the branch does something that a graph of tensors does not show.
        """
        out = self.run(f, ends, states)
        seen, expected = tuple(out[: self.shape.state]), trial.state
        wanted = [p for p in (*f.branch.parameters(), *states[0], *f.context.derived_leaves()) if p.requires_grad]
        if wanted and any(part.requires_grad for part in expected):
            # A direction of its own at each element: norms make their output blind to the simple ones.
            drawn = torch.Generator().manual_seed(0)
            along = [torch.randn(part.shape, generator=drawn).to(part) for part in expected]
            seen, expected = ((*parts, *_gradients(parts, wanted, along)) for parts in (seen, expected))
        cast, computed = _autocast(states)
        computed = computed if cast else f.dtype or states[0][0].dtype
        tolerance = max(TOLERANCE, 8.0 * torch.finfo(computed).eps)
        sizes = [float(part.detach().norm()) for part in expected]
        for one, other, size in zip(seen, expected, sizes, strict=True):
            if float((one - other).detach().norm()) > tolerance * (size + 0.1 * max(sizes)):
                raise InvalidInput(
                    "compile=True: the traced step differs from the step as it is run, so the branch depends on "
                    "something that a graph of tensors does not show (a random draw or a torch.no_grad of its own, a "
                    "custom autograd function, a Python value that changes): use compile=False"
                )


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangent: Sequence[Tensor]) -> list[Tensor]:
    through = [(out, g) for out, g in zip(outputs, cotangent, strict=True) if out.requires_grad]
    outs, gs = zip(*through, strict=True)
    found = torch.autograd.grad(outs, inputs, gs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _resolve(context: SolveContext, name: MaskInput | DerivedInput, how: Any) -> Tensor:
    """What the traced step asks ``context`` for, made now if it is not there yet."""
    if isinstance(name, DerivedInput):
        return context.derive(name.module, name.name, how)
    draw, shape, stride, dtype, device = how
    return context.mask_of(name, draw, torch.empty_strided(shape, stride, dtype=dtype, device=device))


def _trace(
    f: Solve,
    make: Callable[..., Trial],
    inputs: dict[MaskInput | DerivedInput, Any],
    ends: tuple[float, float],
    states: Sequence[State | None],
) -> _Compiled:
    """The step ``make`` as a graph."""
    shape = _Shape()
    compiled = _Compiled(lambda: (), inputs, shape)
    arguments = [x.detach().requires_grad_(x.requires_grad) for x in compiled.arguments(f, ends, states)]
    parameters = [name for name, _ in f.branch.named_parameters()]
    buffers = [name for name, _ in f.branch.named_buffers()]
    hung = _hung(f.branch)
    sizes = [0 if state is None else len(state) for state in states]

    def flat(*tensors: Tensor) -> list[Tensor]:
        left = list(tensors)

        def take(n: int) -> State:
            return tuple(left.pop(0) for _ in range(n))

        start, stop, middle = take(3)
        parts = [None if state is None else take(n) for state, n in zip(states, sizes, strict=True)]
        own = dict(zip((*parameters, *buffers), take(len(parameters) + len(buffers)), strict=True))
        others = take(len(hung))
        context = _TracedContext(f.context, dict(zip(inputs, left, strict=True)), shape)
        g = Solve(lambda t, h: torch.func.functional_call(f.branch, own, (t, h)), context, f.dtype)
        if f.integrands is not None:
            g.integrands = f.integrands.within(context)
        context.begin_step(middle, middle)
        with torch.enable_grad(), _in_place(hung, others):
            trial = make(g, start, stop, *parts)
        error, last = trial.error or (), trial.last or ()
        shape.state, shape.error, shape.last = len(trial.state), len(error), len(last)
        return [*trial.state, *error, *last, *(moment.detach() for moment in context.met)]

    try:
        # Autograd detaches what it saves, which is no end of a gradient. Penalties are derivatives of f themselves, and
        # are differentiated once more.
        kept = kernels.in_graphs(arguments[0].device) if f.integrands is None else {}
        stands_for = {torch.ops.aten.detach.default: torch.ops.aten.alias.default, **kept}
        trace = make_fx(flat, decomposition_table=stands_for, tracing_mode="fake", _allow_non_fake_inputs=False)
        compiled.graph = trace(*arguments)
    except InvalidInput:
        raise
    except Exception as problem:  # tracing raises whatever the branch's way to look at a value leads to
        if "convert all Tensors to FakeTensors" in str(problem):
            raise InvalidInput(
                "compile=True: the branch uses a tensor that none of its modules holds as a parameter, a buffer or an "
                "attribute, so that a graph would not see it change: register it, or use compile=False"
            ) from problem
        raise InvalidInput(
            f"compile=True: the branch cannot be traced ({str(problem).splitlines()[0] if str(problem) else problem!r}"
            "): it looks at the values of its tensors, perhaps; use compile=False"
        ) from problem
    return compiled


@contextmanager
def _in_place(places: Sequence[tuple[nn.Module, str]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """``tensors`` as the attributes at ``places``, for a while."""
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), tensor in zip(places, tensors, strict=True):
            setattr(module, name, tensor)
        yield
    finally:
        for (module, name), tensor in zip(places, before, strict=True):
            setattr(module, name, tensor)
