"""Gradient mode ``adjoint``: the continuous adjoint (Chen et al. 2018, arXiv 1806.07366, Algorithm 1).

With a = ∂L/∂h, solve backward in time

    dh/dt = f,    da/dt = −aᵀ ∂f/∂h,    dg/dt = −aᵀ ∂f/∂θ,    from h(t1), a(t1), g(t1) = 0,

by the forward pass's solver, on its grid or with its tolerances. The memory does not depend on the number of steps.
It is the gradient of the continuous problem, so it differs from backpropagation by the order of the solver, and h(t)
is reconstructed. Nothing depends on g, so its error need not be controlled (the seminorm of Kidger et al. 2021, arXiv
2009.09457). The cotangent is scaled to maximum 1 before the solve (the equations are linear in it), so that loss
scaling changes neither the error control nor the result. The state of the adjoint solve is at least float32."""

import torch
from torch import Tensor

from resode.blocks.gradients import Gradients, leaves_of, wide
from resode.blocks.solvers import FixedGrid, RungeKutta, Scheme, Solve, State
from resode.blocks.synchronized import common_scale


class Adjoint:
    """The mode, for one solve.

    Args:
        seminorm: leave g out of the error control.

    ``start`` is, after a backward pass, the state that it came back to.
    """

    name = "adjoint"

    def __init__(self, seminorm: bool = True) -> None:
        self.seminorm = seminorm
        self.start: Tensor | None = None

    def forward(self, f: Solve, scheme: Scheme, state: State) -> tuple[State, State]:
        end = self.evaluate(f, scheme, state)
        return end, end

    def evaluate(self, f: Solve, scheme: Scheme, state: State) -> State:
        return scheme.integrate(f, state, RungeKutta(scheme.tableau))

    def backward(self, f: Solve, scheme: Scheme, kept: State, cotangent: State, gradients: Gradients) -> State:
        a, *others = cotangent
        sizes = [part.abs().amax() for part in cotangent if part.numel() > 0]  # those of an empty batch have none
        largest = common_scale(f, torch.stack(sizes).amax() if sizes else a.new_zeros(()))
        # A fixed grid asks the device for nothing, and what is not finite goes through it as through backpropagation.
        if not isinstance(scheme, FixedGrid) and not torch.isfinite(largest):
            # As backpropagation gives: loss scaling that overflowed looks for this, and skips its step.
            gradients.add([torch.full_like(w, torch.nan) for w in gradients.wanted])
            return tuple(part * torch.nan for part in cotangent)
        scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, torch.ones_like(largest))
        field = AdjointField(f, gradients, [part / scale for part in others], self.seminorm)
        zeros = [torch.zeros_like(w, dtype=wide(w.dtype)) for w in gradients.wanted]
        state = scheme.reversed().integrate(field, (kept[0], a / scale, *zeros), RungeKutta(scheme.tableau))
        self.start = state[0]
        gradients.add([g * scale for g in state[2:]])
        return state[1] * scale, *others


class AdjointField:
    """The right-hand side of the adjoint equations for the state (h, a, g); ``others`` are the constant cotangents of
    what the solve integrates along with h."""

    coupled = 2

    def __init__(self, f: Solve, gradients: Gradients, others: list[Tensor], seminorm: bool) -> None:
        self.f, self.gradients, self.others = f, gradients, others
        self.measured = 2 if seminorm else 2 + len(gradients.wanted)

    def __call__(self, t: float | Tensor, state: State) -> State:
        """f, −aᵀ ∂f/∂h and −aᵀ ∂f/∂θ at (t, h)."""
        h, a = state[:2]
        with torch.enable_grad():
            inputs = leaves_of((h,))
            compiler = self.f.compiler
            outputs = self.f(t, inputs) if compiler is None else compiler.slopes(self.f, t, inputs)
            self.gradients.check(outputs, inputs)
            through = [(out, g) for out, g in zip(outputs, (a, *self.others), strict=True) if out.requires_grad]
            asked = (*inputs, *self.gradients.wanted)
            found: tuple[Tensor | None, ...] = (None,) * len(asked)
            if through:
                found = torch.autograd.grad(
                    [out for out, _ in through], asked, [-g.to(out.dtype) for out, g in through], allow_unused=True
                )
        for_h, *rest = (
            torch.zeros_like(of, dtype=wide(of.dtype)) if g is None else g.to(wide(g.dtype))
            for g, of in zip(found, asked, strict=True)
        )
        return outputs[0].detach(), for_h, *rest

    def begin_step(self, start: float, end: float) -> None:
        """As of the solve: masks and weights are those of the step's interval."""
        self.f.begin_step(start, end)

    def keep(self) -> None:
        """Nothing that an adjoint solve meets counts."""

    accept_step = reject_step = keep
