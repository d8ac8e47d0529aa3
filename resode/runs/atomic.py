"""Files that are either old or new, never half-written.

A file is written under a temporary name in its own folder, synced, and renamed over the old one. A process that
is killed leaves the old file, or the new one, and perhaps a temporary file (`sweep` removes those).
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from resode.errors import RunError


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some networked file systems cannot sync a folder, and say so
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, durably; an existing one is fine."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        sync_folder(each.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends; its parents are made.

    If the block raises, ``path`` is what it was and no temporary file stays.

    Raises:
        RunError: when the system refuses (no space, no permission).
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        make_folder(path.parent)
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save, cut short by a full disk, complains of its archive; the reason is one exception below.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise RunError(
            f"cannot write {path} ({reason.strerror}): check the disk's space and the folder's permissions, "
            "then run the same command again"
        ) from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, at once and durably; parents are made.

    Raises:
        RunError: when the system refuses; ``path`` is then what it was.
    """
    with replacing(Path(path)) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers. Only for a folder that nobody else is writing."""
    for draft in folder.rglob(".*.tmp"):
        draft.unlink(missing_ok=True)
