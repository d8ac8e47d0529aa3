"""Penalties on the way of a solve: kinetic energy and the size of the Jacobian.

With d elements of h a sample, and the mean over the batch of B samples,

    K = 1/(B d) ∫ ‖f(t, h)‖² dt,        J = 1/(B d) ∫ ‖εᵀ ∂f/∂h‖² dt,  ε ~ N(0, I) drawn as masks are,

whose expectation over ε is that of the Frobenius norm ‖∂f/∂h‖²_F/d (Hutchinson's estimator): Finlay et al. 2020,
arXiv 2002.02798, eqs. 9–11. Flows with a small K are straight and those with a small J regular, so that few steps
suffice. Both are integrated along with h, by the same solver."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from resode.blocks.solvers import State
from resode.errors import InvalidInput
from resode.layers.context import SolveContext

_collected: ContextVar[list[Tensor] | None] = ContextVar("resode_penalties", default=None)


@contextmanager
def collect_penalties() -> Iterator[list[Tensor]]:
    """The penalties of the forward passes within, one number for each solve that has any; add them to the loss.

    Outside of it no block computes a penalty.
    """
    found: list[Tensor] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def collecting() -> list[Tensor] | None:
    """Where penalties go now; None outside :func:`collect_penalties`."""
    return _collected.get()


class Transport:
    """The integrands of ``kinetic``·K + ``jacobian``·J, for one solve."""

    def __init__(self, context: SolveContext, kinetic: float, jacobian: float) -> None:
        self.context, self.kinetic, self.jacobian = context, kinetic, jacobian

    def within(self, context: SolveContext) -> "Transport":
        """The same integrands, in another context."""
        return Transport(context, self.kinetic, self.jacobian)

    def __call__(self, evaluate: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, State]:
        """f at ``x``, and the integrand there.

        Raises:
            InvalidInput: when the Jacobian is asked for in torch's inference mode, which has no derivatives.
        """
        if self.jacobian == 0.0:
            out = evaluate(x)
            return out, (self.kinetic * _mean_square(out),)
        if torch.is_inference_mode_enabled():
            raise InvalidInput(
                "the penalty jacobian is a derivative of the branch, and torch.inference_mode() has none: evaluate "
                "it within torch.no_grad()"
            )
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():  # εᵀ ∂f/∂h is itself a derivative, in a solve without gradients, too
            at = x if x.requires_grad else x.detach().requires_grad_()
            out = evaluate(at)
            noise = self.context.mask(Transport, torch.randn_like, out.detach())
            value = self.kinetic * _mean_square(out)
            if out.requires_grad:  # otherwise f is a function of the time alone
                product = torch.autograd.grad(out, at, noise, create_graph=wanted, materialize_grads=True)[0]
                value = value + self.jacobian * _mean_square(product)
        return (out, (value,)) if wanted else (out.detach(), (value.detach(),))


def _mean_square(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean()
