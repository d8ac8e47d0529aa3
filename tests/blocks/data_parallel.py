"""One process of a data-parallel backward pass: ``python data_parallel.py RANK WORLD FOLDER``.

Writes, to FOLDER/RANK.json, how far the gradients of this process are from those of the whole batch in one process.
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from resode.blocks import GRADIENTS, Branch, ODEBlock
from resode.stack import Stack


def make_net(gradient: str) -> nn.Sequential:
    torch.manual_seed(0)
    stack = Stack(norm="group", activation="tanh", conv="weight-standardized")
    block = ODEBlock(Branch(4, stack, time="concat"), "rk4", steps=3, gradient=gradient)
    return nn.Sequential(nn.Conv2d(2, 4, 3), block, nn.Conv2d(4, 4, 1), block, nn.Flatten(), nn.Linear(64, 3)).double()


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def furthest(gradient: str, rank: int, world: int) -> float:
    """The largest relative difference, over two backward passes (the second reuses the buckets of the first)."""
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = gradients(make_net(gradient), x)
    parallel = DistributedDataParallel(make_net(gradient))
    found = [gradients(parallel, x.chunk(world)[rank]) for _ in range(2)]
    return max(float((a - b).norm() / b.norm()) for own in found for a, b in zip(own, whole, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    measured = {gradient: furthest(gradient, rank, world) for gradient in GRADIENTS}
    distributed.barrier()
    distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(measured))
