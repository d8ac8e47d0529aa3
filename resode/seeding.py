"""torch's default random state, seeded for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """The default generators of the CPU and of ``device`` begin at ``seed``, and are restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_default(seed, device)
        yield


def seed_default(seed: int, device: torch.device = CPU) -> None:
    """Seed the default generators of the CPU and of ``device``, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
