"""The data sets by name: where each is found, how it is split, and onto which device it goes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.data import folder, sources
from resode.data.dataset import DataSet, check_whole, moments
from resode.data.splits import Split, hold_out, redraw_labels
from resode.errors import InvalidInput, choose, probability

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "moons", "circles")

_POINTS = ("moons", "circles")
_FOLDER = "imagefolder:"


def check_name(name: str) -> None:
    """Check the name of a data set, and the layout of an image folder, without reading any data.

    Raises:
        InvalidInput: for an unknown name, with the choices; for an image folder that is not there, or not laid
            out as PATH/train/<class>/* and PATH/test/<class>/*.
    """
    if name.startswith(_FOLDER):
        folder.check(_folder_path(name))
    else:
        choose(name, (*NAMES, f"{_FOLDER}PATH"), "data set")


def load(
    name: str,
    *,
    data_dir: str | Path = "data",
    seed: int = 0,
    validation: float = 0.1,
    label_noise: float = 0.0,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> DataSet:
    """Load a data set into the memory of a device.

    Args:
        name: one of `NAMES`, or ``imagefolder:PATH``.
        data_dir: where torchvision's sets lie, or are downloaded to. The others do not use it.
        seed: decides the validation split, then the label noise. The test split never depends on it.
        validation: fraction of the training examples to hold out, stratified, see `hold_out`; 0 for none.
        label_noise: fraction of the training labels to draw anew, see `redraw_labels`. The others stay clean.
        image_size: None for the images as they are. A number makes them square, of that side: an image folder's
            by resizing the shorter side and cropping the centre, the other sets' by resizing.
        device: where the tensors go.

    Raises:
        InvalidInput: for an argument out of its range, or data that cannot be found, downloaded or read.
    """
    check_name(name)
    _check_settings(name, seed, validation, label_noise, image_size)
    device = usable(device)
    source = _read(name, Path(data_dir).expanduser(), image_size)
    generator = torch.Generator().manual_seed(seed)
    train, held_out = hold_out(source.train, validation, generator)
    train = redraw_labels(train, label_noise, source.classes, generator)
    mean, std = moments(train.inputs)
    return DataSet(
        name=name,
        train=train.to(device),
        validation=held_out.to(device),
        test=source.test.to(device),
        classes=source.classes,
        mean=mean.to(device),
        std=std.to(device),
    )


def _read(name: str, data_dir: Path, image_size: int | None) -> sources.Source:
    if name.startswith(_FOLDER):
        return folder.read(_folder_path(name), image_size)
    makers = {"digits": sources.digits, "moons": sources.moons, "circles": sources.circles}
    source = makers[name]() if name in makers else sources.download(name, data_dir)
    if image_size is None:
        return source
    train, test = (Split(_resized(part.inputs, image_size), part.labels) for part in (source.train, source.test))
    return sources.Source(train, test, source.classes)


def _resized(images: Tensor, size: int) -> Tensor:
    """Square uint8 images as (N, C, size, size): bilinear, with antialiasing where they shrink."""
    parts = (
        F.interpolate(part.float(), size, mode="bilinear", antialias=True)
        for part in images.split(1024)  # all at once would take four times the memory of the set
    )
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def _folder_path(name: str) -> Path:
    path = name.removeprefix(_FOLDER)
    if not path:
        raise InvalidInput(f"{name!r} names no folder: write {_FOLDER}PATH")
    return Path(path).expanduser()


def _check_settings(name: str, seed: int, validation: float, label_noise: float, image_size: int | None) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed is {seed!r}: it must be a whole number from 0 on, below 2**63")
    probability(validation, "validation")
    if not 0.0 <= label_noise <= 1.0:
        raise InvalidInput(f"label_noise is {label_noise!r}: it must be a fraction in [0, 1]")
    if image_size is not None:
        check_whole(image_size, "image_size")
        if name in _POINTS:
            raise InvalidInput(f"image_size is {image_size}, but {name} has points, not images: leave it out")


def usable(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be put there.

    Raises:
        InvalidInput: if none can.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"device {str(device)!r} cannot be used ({reason}): try 'cpu'") from error
