"""One process of a training with synchronized batch norms: ``python synchronized_processes.py RANK WORLD FOLDER``.

Writes, to FOLDER/RANK.json, how far this process is from one that has the whole batch: by block and by sizes of the
shares, in the outputs, the gradients and the running statistics.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from resode.blocks import Branch, ODEBlock, ResidualBlock, synchronize
from resode.stack import Stack

SIZES = {"equal": (3, 3), "unequal": (5, 1)}
STACK = Stack(norm="batch", activation="tanh")
BLOCKS = {
    "residual": lambda: ResidualBlock(Branch(4, STACK)),
    "backprop": lambda: ODEBlock(Branch(4, STACK, time="concat"), "rk4", steps=3),
    "checkpoint": lambda: ODEBlock(Branch(4, STACK, time="concat"), "heun", steps=3, gradient="checkpoint"),
    "reversible": lambda: ODEBlock(Branch(4, STACK, time="concat"), "heun", steps=3, gradient="reversible"),
    "adjoint": lambda: ODEBlock(Branch(4, STACK, time="concat"), "rk4", steps=3, gradient="adjoint"),
}


def make_net(block: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), BLOCKS[block](), nn.Flatten(), nn.Linear(64, 3)).double()
    with torch.no_grad():  # values that no symmetry hides
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def passed(net: nn.Module, x: Tensor, weight: float) -> dict[str, list[Tensor]]:
    """Outputs, gradients and running statistics after two forward and backward passes."""
    for scale in (1.0, 2.0):
        net.zero_grad()
        out = net(scale * x)
        (weight * out.square().sum()).backward()
    return {
        "outputs": [out.detach()],
        "gradients": [parameter.grad for parameter in net.parameters()],
        "statistics": [buffer.double() for buffer in net.buffers()],
    }


def furthest(block: str, sizes: tuple[int, ...], rank: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 2, 6, 6, dtype=torch.float64, generator=generator) + torch.arange(6.0).view(-1, 1, 1, 1)
    whole = passed(make_net(block), x, 1.0)
    whole["outputs"] = [whole["outputs"][0].split(sizes)[rank]]
    net = make_net(block)
    assert synchronize(net) == 2
    # Each process has the samples of its own, and DistributedDataParallel averages the gradients.
    own = passed(DistributedDataParallel(net), x.split(sizes)[rank], float(len(sizes)))
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(own[name], whole[name], strict=True))
        for name in whole
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    found = {f"{block}-{name}": furthest(block, SIZES[name], rank) for block, name in product(BLOCKS, SIZES)}
    distributed.barrier()
    distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))
