"""Training on a fixed number of random steps a batch: the experiment of Veit et al. 2016, section 4.3.

They find the gradient of a residual net of 54 blocks to come from paths of 5 to 17 of them, and train with only 23
blocks a batch, drawn at random, the others being their shortcuts: the whole net then errs no more than one trained
whole. It is stochastic depth (Huang et al. 2016, arXiv 1603.09382) with the number of blocks fixed in place of their
probability. As there, what a branch adds is the same in the mean: k of n branches are multiplied by n/k in training,
so that the whole net can be evaluated as it is (Huang et al. multiply by k/n in evaluation). Without that the states of
the whole net are larger than any met in training, and its batch norms' statistics are of no use.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.ode import ode_blocks
from resode.dynamics import dynamics
from resode.errors import InvalidInput


class SampledSteps(nn.Module):
    """``model``, of whose residual steps ``active`` are drawn for each forward pass in training; whole in evaluation.

    Args:
        model: any residual network that :func:`resode.dynamics` reads, its ODE blocks excepted.
        active: the number of residual steps that keep their branch, drawn uniformly from the CPU's random state. These
            branches are multiplied by the number of steps over ``active``.

    Raises:
        InvalidInput: for a model that cannot be read or has ODE blocks, or a number of steps it does not have.
    """

    def __init__(self, model: nn.Module, active: int) -> None:
        super().__init__()
        if ode_blocks(model):
            raise InvalidInput(
                "training on sampled steps is for networks of blocks, and this one has an ODE block, of which every "
                "step is the same branch: use path dropout in its stack"
            )
        self.model, self.active = model, active
        view = dynamics(model)
        choices = [i for i, step in enumerate(view.steps) if step.has_choice]
        if not 1 <= active <= len(choices):
            raise InvalidInput(
                f"{active} active steps: from 1 to {len(choices)} are expected, the model's residual steps"
            )
        # Kept out of the module's own parts: they are the model's, which is the only submodule.
        self.__dict__["_view"], self.__dict__["_choices"] = view, choices

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        drawn = torch.randperm(len(self._choices))[: self.active].tolist()
        kept, factor = {self._choices[i] for i in drawn}, len(self._choices) / self.active
        steps = list(self._view.steps)
        for i in self._choices:
            steps[i] = replace(steps[i], scale=steps[i].scale * factor) if i in kept else steps[i].deleted()
        return self._view.with_steps(steps)(x)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy reads the steps of its own model.
        return SampledSteps, (self.model, self.active), {"training": self.training}

    def extra_repr(self) -> str:
        return f"active={self.active} of {len(self._choices)}"
