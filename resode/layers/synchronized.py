"""The moments of a batch that is spread over several processes.

Process r holds n_r values of a channel, N = Σ_r n_r in all, and

    μ = (1/N) Σ_r Σ_i x_ri,    σ² = (1/N) Σ_r Σ_i (x_ri − μ)²,

which weigh every value alike, however unequal the shares are. The sums over r are differentiable: a cotangent of μ or
σ² in one process belongs to the values in all, so that the backward pass sums the cotangents over the processes. The
deviations are summed about the common μ: in Σx² − Nμ² the digits of a large mean would cancel.

Every process has to ask for the same sums in the same order, or each waits for the others for ever: all are in training
mode, and all evaluate a branch equally often.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from resode.errors import InvalidInput


class Processes:
    """The processes of a group of ``torch.distributed``; all of them if ``group`` is None.

    It stands for a connection and not for values, so a deep copy of a layer holds the same one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return self

    def count(self) -> int:
        """How many they are.

        Raises:
            InvalidInput: when ``torch.distributed`` is not there, or not initialized.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise InvalidInput(
                "synchronized batch norm averages over the processes of torch.distributed, which is not initialized: "
                "call torch.distributed.init_process_group in each process first (torchrun starts them), or use batch "
                "norm without synchronization"
            )
        return distributed.get_world_size(self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Σ_r x_r, differentiable, the same in every process."""
        return _Sum.apply(x, self.group)


class _Sum(torch.autograd.Function):
    """Σ_r x_r, whose derivative is the sum of the cotangents. (torch's own is deprecated, and its heir not public.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(g, ctx.group), None


def common_moments(x: Tensor, processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, (biased) variance and number of values of each channel over all ``processes``.

    Args:
        x: this process's share, (B, C) or (B, C, H, W), in at least float32; B may differ, and may be 0.

    Returns:
        μ (C,), σ² (C,), N (a tensor of no dimension: its value need not leave the device).
    """
    over = [0, *range(2, x.ndim)]
    count = x.new_full((1,), x.numel() // max(x.shape[1], 1))
    total = processes.sum(torch.cat([x.sum(over), count]))
    number = total[-1].detach()
    mean = total[:-1] / number
    return mean, processes.sum((x - by_channel(mean, x)).square().sum(over)) / number, number


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) in a shape that spreads over the channels of ``x`` (B, C, …)."""
    return values.view(-1, *[1] * (x.ndim - 2))
