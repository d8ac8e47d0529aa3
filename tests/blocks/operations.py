"""What a computation asks of the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "masked_select")
"""Operations whose result is a Python value, or has a shape that follows from values: the host waits for them."""


class Operations(TorchDispatchMode):
    """Notes the operations that are run, and the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return out

    def count(self, *names):
        return sum(name in names for name in self.names)
