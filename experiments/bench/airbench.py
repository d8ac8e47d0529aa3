"""airbench94 (Jordan 2024, arXiv 2404.00498), a peer of the trainer, on the images of one of our data sets.

Its package reads CIFAR-10 from two files in the working directory, where it would download them; here they are written
from the data set, so that both train on the same images. It tells the accuracy and the time of a training in a table on
the standard output alone.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from resode.data.sets import DataSet
from resode.data.splits import Split
from resode.errors import ResodeError
from resode.seeding import seeded

FOLDER = "cifar10"
"""Of its two files, in the working directory."""


class Unreadable(ResodeError, ValueError):
    """airbench said something else than expected: another version, perhaps."""


@dataclass(frozen=True)
class Outcome:
    """What came of a training: the accuracy on the test images, and the seconds it took."""

    accuracy: float
    seconds: float


def absent(data: DataSet) -> str | None:
    """Why airbench takes no part in a comparison on ``data``; None where it does."""
    if find_spec("airbench") is None:
        return "not installed (pip install airbench==0.1.8)"
    if not data.train.inputs.is_cuda:
        return "it needs a CUDA device"
    if data.channels != 3 or data.size != (32, 32) or data.classes != 10:
        return f"it knows colour images of 32×32 pixels in 10 classes, and {data.name} is something else"
    return None


@contextlib.contextmanager
def ready(data: DataSet) -> Iterator[None]:
    """Work in a folder where airbench finds the training and the test images of ``data``, for a while."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / FOLDER).mkdir()
        for name in ("train", "test"):
            torch.save(_as_its_own(getattr(data, name), data.classes), Path(place) / FOLDER / f"{name}.pt")
        with contextlib.chdir(place), _kernels_by_trial():
            yield


def train(seed: int, device: torch.device, warmup: bool = False) -> Outcome | None:
    """Train its net as it does, where the data are :func:`ready`; ``warmup`` makes one step alone, of no outcome.

    The seconds are by its own clock: those of the steps and of the last evaluation (of six views of each test image),
    without those of reading the data, building the net and evaluating it after each epoch.

    Raises:
        Unreadable: when the table it prints is another than that of version 0.1.8.
    """
    import airbench

    said = io.StringIO()
    with contextlib.redirect_stdout(said), seeded(seed, device):
        airbench.warmup94() if warmup else airbench.train94(verbose=True)
    return None if warmup else outcome(said.getvalue())


def outcome(said: str) -> Outcome:
    """What the table ``said`` ends with.

    Raises:
        Unreadable: when it is another table.
    """
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    last = rows[-1] if rows else []
    try:
        _run, what, _loss, _train, _plain, accuracy, seconds = last
        if what != "eval":
            raise ValueError("the last row is of another kind")
        return Outcome(float(accuracy), float(seconds))
    except ValueError as problem:
        raise Unreadable(
            f"airbench's last row is {last}: a run, eval, two losses, two accuracies and the seconds were expected; "
            "install airbench==0.1.8"
        ) from problem


def _as_its_own(split: Split, classes: int) -> dict[str, object]:
    """``split`` as airbench saves it: uint8 images (N, H, W, C), and labels."""
    images = split.inputs.permute(0, 2, 3, 1).contiguous()
    return {"images": images.cpu(), "labels": split.labels.cpu(), "classes": [str(k) for k in range(classes)]}


@contextlib.contextmanager
def _kernels_by_trial() -> Iterator[None]:
    """Let cudnn choose its kernels by trial, as airbench's import does for the whole process, for a while."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
