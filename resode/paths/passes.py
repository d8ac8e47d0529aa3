"""What every analysis of gradients does: the states of one forward pass, and the cotangent of the last of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resode.dynamics import ResidualDynamics, Step
from resode.errors import InvalidInput
from resode.paths.linear import Linear
from resode.paths.places import require_view

Loss = Callable[[Tensor], Tensor]
"""From the logits (B, classes) to one number, such as ``lambda z: F.cross_entropy(z, labels, reduction="sum")``.

A sum over the batch gives each sample its own gradient; a mean divides all of them by B.
"""


@contextmanager
def differentiating(view: ResidualDynamics, plain_attention: bool = False) -> Iterator[None]:
    """The network in evaluation mode, with parameters that ask for no gradient; all is restored afterwards.

    Args:
        plain_attention: by matrix products and softmax. The fused kernels have backward passes that can neither be
            differentiated nor vectorized.
    """
    parameters = [] if view.model is None else [p for p in view.model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(view.evaluation())
        if plain_attention:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            for p in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)


def input_of(view: ResidualDynamics, x: Tensor, at: int | None) -> Tensor:
    """``x``, if derivatives with respect to it, or to the state before step ``at``, can be taken.

    Raises:
        InvalidInput: for anything but a view; an ``x`` that is no batch, or has no derivatives where they are asked
            for; an ``at`` that is the place of no state.
    """
    require_view(view, "a gradient by paths")
    count = len(view.steps)
    if at is not None and not 0 <= at <= count:
        raise InvalidInput(f"at is {at}: the states before the {count} steps, and after the last, are 0 … {count}")
    if not isinstance(x, Tensor) or x.ndim == 0 or x.numel() == 0:
        found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InvalidInput(f"x is {found}: a batch of at least one input is expected")
    if at is None and not x.is_floating_point():
        raise InvalidInput(
            f"x is of {x.dtype}: a gradient in x needs floating-point numbers; use x.float() if it holds numbers, or "
            "at=0, for the gradient in the state after the stem, if it holds indices"
        )
    with torch.inference_mode(False):  # where a clone is an ordinary tensor again
        return x.clone() if x.is_inference() else x


def states_of(view: ResidualDynamics, x: Tensor) -> list[Tensor]:
    """The states before the first step, after the first, …, after the last, outside any graph.

    Raises:
        InvalidInput: for a state that is no tensor of floating-point numbers, or that a step overwrites.
    """
    h = require_state(view.stem(x), "the stem")
    states = [h]
    for step in view.steps:
        h = after(step, h)
        states.append(h)
    return states


def after(step: Step, h: Tensor) -> Tensor:
    """The state after ``step``.

    Raises:
        InvalidInput: when it is no tensor of floating-point numbers, or the step has changed ``h`` itself.
    """
    version = h._version
    out = require_state(step(h), f"step {step.label!r}")
    if h._version != version:
        raise InvalidInput(
            f"step {step.label!r} changes the state it is given in place (an activation with inplace=True, first of "
            "its layers?), and the state before it is needed again: use inplace=False"
        )
    return out


def require_state(h: Tensor, what: str) -> Tensor:
    """Return ``h`` if it is a tensor of floating-point numbers.

    Raises:
        InvalidInput: when it is not.
    """
    if isinstance(h, Tensor) and h.is_floating_point():
        return h
    found = f"a tensor of {h.dtype}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
    raise InvalidInput(f"{what} gives {found}: derivatives need states of floating-point numbers")


def cotangent(view: ResidualDynamics, h: Tensor, loss: Loss) -> Tensor:
    """The gradient of the loss in the last state ``h``.

    Raises:
        InvalidInput: when the loss is not one number, or does not depend on the logits.
    """
    head = Linear(lambda h: _one_number(loss(view.head(h))), h)
    if head.is_zero:
        raise InvalidInput(
            "the loss does not depend on the state before the head by operations that autograd follows: is something "
            "detached, made by argmax, or taken out by item()?"
        )
    (v,) = head.pull([torch.ones_like(head.value)])
    return torch.zeros_like(h) if v is None else v


def _one_number(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise InvalidInput(f"the loss gives a {type(loss).__name__}: a tensor of one number is expected")
    if loss.ndim > 0:
        raise InvalidInput(
            f"the loss gives a tensor of shape {tuple(loss.shape)}: one number is expected; use reduction='sum', so "
            "that each sample gets its own gradient"
        )
    return loss
