"""How the C library keeps the memory that tensors on a CPU free."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_KEPT, LARGEST_BLOCK = 2**31 - 1, 32 * 2**20
"""The largest values, in bytes, that glibc takes: of memory kept at the end of the heap, and of a block within it."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next tensors; whether that is so now.

    A training frees its activations at each step and asks for as much at the next. glibc gives large blocks back to the
    system in between, and the system hands out each page anew, filled with zeros, when it is touched; with
    large batches that is a good part of a step. What is kept is no more than was in use at once, nor than 2 GiB, and
    blocks of more than 32 MiB are given back all the same.

    Nothing is done where the C library is another, nor where the environment sets its heap (``MALLOC_…_``,
    ``GLIBC_TUNABLES``), as a user's word counts for more. See mallopt(3).
    """
    ours = platform.libc_ver()[0] == "glibc" and not any(
        name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ
    )
    if not ours:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(M_TRIM_THRESHOLD, MOST_KEPT), mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    return done == (1, 1)
