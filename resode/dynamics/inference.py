"""A copy of a network made for speed: to be evaluated many times, and never trained.

What is done (``python -m experiments.bench_paths`` measures what it comes to, in float32 and in bfloat16):

* Batch norms are folded into the convolutions or linear layers before them (see ``layers.fold``).
* Weights and images lie channels-last in memory, as oneDNN's kernels work on them (and cuDNN's in half precision);
  otherwise each convolution reorders what it takes and gives.
* The sum of a step is written into what its branch gave, and a ReLU after it into the sum: one large new tensor, with
  its page faults, in place of three.
* In bfloat16 convolutions are several times as fast where AMX multiplies.

Tried on such a CPU and left out: ``inference_mode`` in place of ``no_grad``, and weights packed for oneDNN beforehand,
gained nothing; ``torch.jit``'s frozen graphs are no faster than folded and channels-last; oneDNN's convolution, sum and
ReLU as one are, in bfloat16, but torch has them for its compiler's use alone.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.dynamics import read_on
from resode.dynamics.additions import Activation
from resode.dynamics.ode import Grid
from resode.dynamics.parts import Reader
from resode.dynamics.step import Fresh, Map, Step
from resode.dynamics.trace import Trace
from resode.dynamics.view import ResidualDynamics
from resode.errors import InvalidInput
from resode.layers.factors import multiply_out
from resode.layers.fold import LINEAR_MAPS, foldable, is_hooked, is_known, varies
from resode.layers.fold import fold as fold_norm
from resode.layers.layout import channels_last, lay_channels_last
from resode.layers.rounding import round_filters

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
FOLDED_CLOSE = 1e3
"""How far folding may move the logits, in units of rounding of the largest."""
HALF_CLOSE = 0.1
"""How far half precision may, relative to the largest: farther off, the state overflows, or worse."""


def inference(
    model: nn.Module,
    example: Tensor | None = None,
    dtype: torch.dtype | None = None,
    read: Reader | None = None,
    fold: bool | None = None,
    channels_last: bool = True,
    grid: Grid | None = None,
) -> ResidualDynamics:
    """The view of a copy of ``model`` made for fast evaluation; the model itself is left as it is.

    The copy is in evaluation mode, and its parameters take no gradients (inputs and states may). A batch norm is folded
    where it takes the output of a convolution or linear layer, nothing else does, both are called once in the network,
    and both stand in the same part of a step, so that lesions of the copy are those of the model. In ``view.model`` it
    is a :class:`~resode.layers.fold.Folded` then.

    Args:
        model, example, grid, read: as in :func:`resode.dynamics`. What follows what is found on (two of) ``example``.
        dtype: of parameters and states; the model's own if None. In bfloat16 and float16 the head and the batch norms
            that are not folded keep the model's own, and so do the logits. How far bfloat16 moves the logits depends on
            the weights: trained ones of a deep net round worse than those it began with.
        fold: fold batch norms. By default they are, unless that moves the logits on the example by more than rounding
            explains: a deep net that was not trained well may enlarge any rounding, and is then left as it is.
        channels_last: lay images and the weights of convolutions channels-last.

    Raises:
        InvalidInput: as :func:`resode.dynamics`; for another ``dtype``; without an example where no input is known; and
            when half precision, or ``fold=True``, moves the logits on the example by more than rounding explains.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype is {dtype}: choose {', '.join(map(str, DTYPES))}")

    def prepared(fold: bool) -> tuple[ResidualDynamics, Tensor]:
        return _prepared(model, example, read, fold, channels_last, grid)

    try:
        view, x = prepared(folds := fold is not False)
    except _MovedError:
        if fold:
            raise
        view, x = prepared(folds := False)
    own = next((p.dtype for p in view.model.parameters() if p.is_floating_point()), torch.float32)
    if dtype in HALF and dtype is not own:
        low, _ = prepared(folds)
        _lower(low.model, dtype)
        found = ResidualDynamics(_Entrance(low.stem, dtype, channels_last), low.steps, _Exit(view.head, own), low.model)
        with torch.no_grad():
            _require_close(found(x), view(x), HALF_CLOSE, f"dtype={dtype}", "dtype=torch.float32")
        return found
    view.model.to(dtype or own)
    return ResidualDynamics(_Entrance(view.stem, dtype or own, channels_last), view.steps, view.head, view.model)


@dataclass(frozen=True)
class _Entrance:
    """A stem that brings its input into type and layout."""

    stem: Map
    dtype: torch.dtype
    channels_last: bool

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x.to(self.dtype)
        if self.channels_last and x.ndim == 4:
            x = channels_last(x)
        return self.stem(x)


@dataclass(frozen=True)
class _Exit:
    """A head of another type than the states: it is cheap, and rounding it costs half of the error."""

    head: Map
    dtype: torch.dtype

    def __call__(self, h: Tensor) -> Tensor:
        return self.head(h.to(self.dtype))


def _prepared(
    model: nn.Module, example: Tensor | None, read: Reader | None, fold: bool, channels_last: bool, grid: Grid | None
) -> tuple[ResidualDynamics, Tensor]:
    """The view of a copy of ``model``, changed in place, in the model's own type; and an input."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    multiply_out(copied)
    view, x = read_on(copied, example, grid, read)
    if x is None:
        raise InvalidInput(
            f"it is not known what inputs this {type(model).__name__} takes, and what follows what in it shows when it "
            "is evaluated: pass example=x"
        )
    if channels_last:
        lay_channels_last(copied)
    # The layers whose outputs are new tensors; a Trace tells what becomes of these.
    trace = Trace(view, x[:2], [module for module in copied.modules() if is_known(module)])
    if fold:
        with torch.no_grad():
            expected = view(x)
            for layer, norm in _pairs(trace):
                fold_norm(layer, norm)
            rounding = torch.finfo(expected.dtype).eps
            _require_close(view(x), expected, min(FOLDED_CLOSE * rounding, HALF_CLOSE), "fold=True", "fold=False")
    return view.with_steps([_overwriting(step, i, trace) for i, step in enumerate(view.steps)]), x


def _pairs(trace: Trace) -> list[tuple[nn.Module, _BatchNorm]]:
    """(layer, norm) where the norm can be folded into the layer."""
    found = []
    for output in trace.outputs:
        takers = list(output.takers)
        if len(takers) == 1:
            place, norm = takers[0]
            once = trace.calls[output.maker] == 1 == trace.calls[norm]
            # A linear layer acts on the last axis, a norm on the second.
            same_axis = not isinstance(output.maker, nn.Linear) or output.tensor.ndim == 2
            if place == output.place and once and same_axis and foldable(output.maker, norm):
                found.append((output.maker, norm))
    return found


def _overwriting(step: Step, i: int, trace: Trace) -> Step:
    """The step, with its sum written into what its branch gave where nothing else has that, and a ReLU into the sum."""
    only_summed = {(("sum", i), None)}
    if any(output.place == ("branch", i) and output.takers == only_summed for output in trace.outputs):
        step = replace(step, branch=Fresh(step.branch))
    post = step.post.module if isinstance(step.post, Activation) else step.post
    return replace(step, post=torch.relu) if type(post) is nn.ReLU and not is_hooked(post) else step


def _lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers in half precision, but those of batch norms, whose kernels take statistics as they are."""
    for module in model.modules():
        if isinstance(module, LINEAR_MAPS) and not varies(module):
            module.weight.data = round_filters(module.weight, dtype)
        if not isinstance(module, _BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


class _MovedError(InvalidInput):
    """The logits moved by more than rounding explains."""


def _require_close(found: Tensor, expected: Tensor, close: float, setting: str, instead: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= close:
        raise _MovedError(
            f"{setting} moves the logits on the example by {off:.1e} of the largest, and at most {close:.1e} is "
            f"expected: use {instead}"
        )
