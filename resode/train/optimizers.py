"""Optimizers by name, with weight decay that is part of the gradient or apart from it.

====== ================================================================== =============================================
name   the step, with the gradient g of the loss and the rate η            source
====== ================================================================== =============================================
sgd    m ← μ m + (g + λ w);  w ← w − η m                                   torch's SGD
sgdw   m ← μ m + g;  w ← w − η m − η λ w                                   Loshchilov & Hutter 2019, arXiv 1711.05101,
                                                                          algorithm 1
adam   w ← w − η m̂/(√v̂ + ε), moments of g + λ w                           Kingma & Ba 2015, arXiv 1412.6980
adamw  w ← w − η m̂/(√v̂ + ε) − η λ w, moments of g                         as sgdw, algorithm 2
====== ================================================================== =============================================

sgd and adam so minimize the loss plus ½λ‖w‖². With sgdw and adamw the decay is no part of what is averaged or scaled.
The paper's λ is that of a step at the peak of the schedule, η_peak·λ here; and its m is of η g, not of g, which is the
same while η does not change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.sgd import sgd

from resode.errors import InvalidInput, choose, positive
from resode.nets.transfer import REMEMBERED
from resode.train.penalties import parameter_groups

OPTIMIZERS = ("sgd", "sgdw", "adam", "adamw")


class SGDW(SGD):
    """torch's SGD with weight decay apart from the gradient: w ← (1 − η λ) w − η m.

    Its arguments, groups and state are those of SGD. It is not fused: a fused step is told of an overflow of float16's
    gradients only when it is under way, and the decay would be made nevertheless.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone, and so not decayed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor | None] = []
            sparse = self._init_group(group, parameters, gradients, momenta)
            if parameters:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            options = {name: group[name] for name in ("momentum", "lr", "dampening", "nesterov", "maximize", "foreach")}
            sgd(parameters, gradients, momenta, weight_decay=0.0, has_sparse_grad=sparse, fused=False, **options)
            if group["momentum"] != 0.0:
                for parameter, momentum in zip(parameters, momenta, strict=True):
                    self.state[parameter]["momentum_buffer"] = momentum
        return loss


REMEMBERED[SGDW] = REMEMBERED[SGD]


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Optimizer:
    """The optimizer called ``name`` for the parameters of ``model`` that require gradients.

    Weights decay; norms, biases and single numbers do not (see :func:`parameter_groups`). On CUDA the step is one fused
    kernel (but for sgdw). On the CPU it is not: there a fused step is quicker but rounds otherwise, and takes any
    gradient for one of the layout of its weights.

    Args:
        name: "sgd", "sgdw", "adam" or "adamw".
        lr: learning rate η.
        weight_decay: λ.
        momentum: μ of sgd and sgdw.
        nesterov: their momentum in Nesterov's form.

    Raises:
        InvalidInput: for an unknown name, a number that makes no sense, Nesterov's form without a momentum, or a model
            that has nothing to train.
    """
    choose(name, OPTIMIZERS, "optimizer")
    positive(lr, "lr")
    if not 0.0 <= weight_decay < float("inf"):
        raise InvalidInput(f"weight_decay is {weight_decay}: a number of at least 0 is expected")
    if not 0.0 <= momentum < 1.0:
        raise InvalidInput(f"momentum is {momentum}: a number in [0, 1) is expected")
    if nesterov and (name not in ("sgd", "sgdw") or momentum == 0.0):
        raise InvalidInput("nesterov is a form of sgd's momentum: use sgd or sgdw with a momentum above 0")
    groups = parameter_groups(model, weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    if not parameters:
        raise InvalidInput("the model has no parameter that requires a gradient: there is nothing to train")
    fused = all(p.is_cuda and p.is_floating_point() for p in parameters) or None
    if name == "adam":
        return Adam(groups, lr=lr, fused=fused)
    if name == "adamw":
        return AdamW(groups, lr=lr, fused=fused)
    if name == "sgdw":
        return SGDW(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    if fused and momentum:
        begin_at_rest(optimizer)
    return optimizer


def begin_at_rest(optimizer: SGD) -> None:
    """Give each parameter of ``optimizer`` a momentum of 0; the first step makes it g, as without.

    A fused SGD makes its momenta in the first step, of memory as it finds it. A step that is left out, as float16's
    first ones are until their scale fits, does not write to them, and the next one adds to whatever was there.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
