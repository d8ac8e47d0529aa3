"""One process writes a run at a time: an advisory lock on a file in its folder."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from resode.errors import RunError


def take_lock(folder: Path, run: Path) -> int:
    """Take the lock of ``folder``, where ``run`` is or is being made: a descriptor that holds it until closed."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    path = folder / ".lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"cannot lock the run {run} ({error.strerror}): check the folder's permissions, or choose another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have renamed or removed the folder since we opened the file: then this locks nothing.
        if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
            raise BlockingIOError
        with contextlib.suppress(OSError):  # who holds it is a courtesy: on a full disk the lock is held as well
            os.ftruncate(lock, 0)
            os.pwrite(lock, me.encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        os.close(lock)
        todo = "close that Run first" if holder == me else "wait until it ends, or choose another folder"
        raise RunError(f"run {run} is being written by {holder}: {todo}") from None
    except OSError as error:
        os.close(lock)
        raise RunError(
            f"cannot lock the run {run} ({error.strerror}): choose a folder on a file system with locks"
        ) from error
    return lock
