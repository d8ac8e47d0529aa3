"""Whether a checkpoint is whole, and holds tensors and plain data alone, told without loading it."""

import zipfile
from typing import BinaryIO

from torch.serialization import get_unsafe_globals_in_checkpoint


def checkpoint_fault(file: BinaryIO) -> str | None:
    """Why a checkpoint is not to be loaded, without loading it."""
    try:
        with zipfile.ZipFile(file) as archive:
            # torch.load compares no checksums: flipped bits would pass for weights.
            if damaged := archive.testzip():
                return f"damaged: the checksum of {damaged} is wrong"
        file.seek(0)
        unsafe = get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # a damaged file raises whatever its damage leads to
        return f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}"
    return f"it holds {', '.join(unsafe)}, not only tensors and plain data" if unsafe else None
