"""Where the named sets come from: scikit-learn brings or draws them, torchvision downloads them.

Each source gives the same training and test examples every time, whatever the seed of a run.
"""

import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from resode.data.splits import Split, hold_out
from resode.errors import InvalidInput

# The class of torchvision.datasets for each set, and the folder it keeps the files in.
DOWNLOADED = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}

# What torchvision raises when the network, the disk or a file fails it. An interrupt is not among them.
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    EOFError,
    HTTPException,
    tarfile.TarError,
    zlib.error,
)


class Source(NamedTuple):
    """All training examples, the test examples, and the number of classes; on the CPU."""

    train: Split
    test: Split
    classes: int


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits of 8 × 8 pixels (UCI optdigits, its test part).

    The 17 grey levels 0 … 16 become 0, 16, 32, …, 255. Every fifth example of each class, in the order of the
    file, is a test example: no random number decides, so the split is the same with any version of anything.
    """
    from sklearn.datasets import load_digits  # here, because it takes a second that other sets need not wait

    images, labels = load_digits(return_X_y=True)
    levels = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test = hold_out(Split(torch.from_numpy(levels), torch.from_numpy(labels).long()), 0.2)
    return Source(train, test, classes=10)


def moons() -> Source:
    """Two interleaving half circles with Gaussian noise of 0.1: 2000 training, 1000 test points."""
    from sklearn.datasets import make_moons

    draws = (make_moons(n, noise=0.1, random_state=state) for state, n in enumerate((2000, 1000)))
    return Source(*(_points(*draw) for draw in draws), classes=2)


def circles() -> Source:
    """A circle around another of half its radius, with Gaussian noise of 0.05: 2000 training, 1000 test points.

    No homeomorphism of the plane separates the two by a line: the standing example of what an ODE on the bare
    inputs cannot do (Dupont et al. 2019, section 3).
    """
    from sklearn.datasets import make_circles

    draws = (make_circles(n, noise=0.05, factor=0.5, random_state=state) for state, n in enumerate((2000, 1000)))
    return Source(*(_points(*draw) for draw in draws), classes=2)


def download(name: str, folder: Path) -> Source:
    """A set of torchvision's, from the files in ``folder``, which are downloaded first if they are not there.

    Raises:
        InvalidInput: if the files can neither be read nor downloaded.
    """
    from torchvision import datasets  # here, because it takes seconds that other sets need not wait

    kind, layout = DOWNLOADED[name]
    try:
        with _quiet_unpickling():
            train, test = (getattr(datasets, kind)(folder, train=part, download=True) for part in (True, False))
            return Source(_images(train), _images(test), classes=len(train.classes))
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidInput(
            f"{name} can neither be read from {folder} nor downloaded into it ({reason}): connect to the "
            "network, or let data_dir (--data-dir) name a folder that already holds torchvision's files, "
            f"{layout}/*"
        ) from error


def _points(points: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(points).float(), torch.from_numpy(labels).long())


def _images(dataset: Any) -> Split:
    """The images of a torchvision set, (N, H, W) or (N, H, W, C), as (N, C, H, W)."""
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(dataset.targets, dtype=torch.int64))


@contextmanager
def _quiet_unpickling() -> Iterator[None]:
    """NumPy 2.4.0 to 2.4.4 warn of how CIFAR's files were pickled in 2009; later ones do not (numpy#31177)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        yield
