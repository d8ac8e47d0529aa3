"""Parameters that are made of others, when a net changes in training, and what an optimizer remembers of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from resode.errors import InvalidInput

Carry = Callable[[Sequence[Tensor], int], Tensor]
"""From one tensor for each old parameter, which scales like the given power of their gradients, to the same of the new.

Power 0 stands for the parameters themselves, 1 for their gradients, 2 for the squares of these."""


@dataclass(frozen=True)
class Transfer:
    """The parameter ``new`` is made of ``old`` ones (it may be one of them itself)."""

    new: nn.Parameter
    old: tuple[nn.Parameter, ...]
    carry: Carry


REMEMBERED: dict[type[Optimizer], dict[str, int]] = {
    SGD: {"momentum_buffer": 1},
    Adam: {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    AdamW: {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
}
"""What optimizers keep for each parameter that scales like a power of the gradient; a count of steps stays as it is."""


class Memory:
    """The groups and state of ``optimizer`` after ``transfers``: made at once, and put in place by :meth:`commit`.

    Raises:
        InvalidInput: for an optimizer whose state is not known.
    """

    def __init__(self, optimizer: Optimizer, transfers: Sequence[Transfer]) -> None:
        powers = next((powers for kind, powers in REMEMBERED.items() if type(optimizer) is kind), None)
        if powers is None:
            known = ", ".join(kind.__name__ for kind in REMEMBERED)
            raise InvalidInput(
                f"what {type(optimizer).__name__} remembers of each parameter is not known to resode, and cannot be "
                f"carried to other parameters: use one of {known}"
            )
        self.optimizer = optimizer
        made: dict[nn.Parameter, list[nn.Parameter]] = {}
        for transfer in transfers:
            made.setdefault(transfer.old[0], []).append(transfer.new)
        gone = {old for transfer in transfers for old in transfer.old}
        self.groups = [
            [new for p in group["params"] for new in ([] if p in gone and p not in made else made.get(p, [p]))]
            for group in optimizer.param_groups
        ]
        self.state = {p: held for p, held in optimizer.state.items() if p not in gone}
        for transfer in transfers:
            if all(old in optimizer.state for old in transfer.old):
                held = [optimizer.state[old] for old in transfer.old]
                self.state[transfer.new] = {key: _carried(transfer, held, key, powers) for key in held[0]}

    def commit(self) -> None:
        """Let the optimizer go on with the new parameters."""
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"] = parameters
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


@torch.no_grad()
def _carried(transfer: Transfer, held: Sequence[dict[str, Any]], key: str, powers: dict[str, int]) -> Any:
    values = [state[key] for state in held]
    if key in powers and all(isinstance(value, Tensor) for value in values):
        return transfer.carry(values, powers[key]).clone()
    return values[0].clone() if isinstance(values[0], Tensor) else values[0]
