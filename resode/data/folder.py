"""Image folders: PATH/train/<class>/* and PATH/test/<class>/*, the layout of torchvision's ImageFolder."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from tqdm import tqdm

from resode.data.sources import Source
from resode.data.splits import Split
from resode.errors import InvalidInput

LAYOUT = "expected PATH/train/<class>/* and PATH/test/<class>/*"


def check(path: Path) -> None:
    """Look whether ``path`` is an image folder, without reading an image.

    Raises:
        InvalidInput: if it is missing, has no ``train`` or ``test``, no class folders or not the same in both, or
            a class without images.
    """
    parts = [path / "train", path / "test"]
    for folder in (path, *parts):
        if not folder.is_dir():
            raise InvalidInput(f"there is no folder {folder}: {LAYOUT}")
    train, test = (class_names(folder) for folder in parts)
    if train != test:
        raise InvalidInput(
            f"{parts[0]} and {parts[1]} hold different classes (in one only: "
            f"{', '.join(sorted(set(train) ^ set(test)))}): give both the same class folders"
        )
    for folder in (part / name for part in parts for name in train):
        if not _has_image(folder):
            raise InvalidInput(f"there is no image in {folder}: put some there, or remove the folder")


def read(path: Path, image_size: int | None) -> Source:
    """Decode the images of a folder into memory, as RGB, with a progress bar.

    Args:
        path: a folder that passes `check`.
        image_size: None takes the images as they are, all of one size. A number resizes each to have it as its
            shorter side, and crops the centre square.

    Raises:
        InvalidInput: for an image that cannot be decoded, or images of different sizes when ``image_size`` is None.
    """
    from torchvision.datasets import ImageFolder  # here, because it takes seconds that other sets need not wait

    train, test = (ImageFolder(path / part) for part in ("train", "test"))
    images = _decode([file for file, _ in (*train.samples, *test.samples)], image_size, path.name)
    labels = torch.tensor(train.targets + test.targets, dtype=torch.int64)
    both = Split(images, labels)
    return Source(both.take(slice(len(train))), both.take(slice(len(train), None)), classes=len(train.classes))


def class_names(folder: Path, layout: str = LAYOUT) -> list[str]:
    """The class folders in ``folder``, in order.

    Raises:
        InvalidInput: if there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise InvalidInput(f"there is no class folder in {folder}: {layout}")
    return names


def _has_image(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    names = (name for _, _, files in os.walk(folder, followlinks=True) for name in files)
    return any(name.lower().endswith(IMG_EXTENSIONS) for name in names)


def _decode(files: Sequence[str], image_size: int | None, name: str) -> torch.Tensor:
    """The images, uint8 (N, 3, H, W)."""
    height, width, _ = _pixels(files[0], image_size).shape
    images = np.empty((len(files), 3, height, width), np.uint8)
    for i, file in enumerate(tqdm(files, desc=f"reading {name}", unit="image", leave=False, disable=None)):
        pixels = _pixels(file, image_size)
        if pixels.shape[:2] != (height, width):
            raise InvalidInput(
                f"{file} is {pixels.shape[0]} × {pixels.shape[1]} pixels, {files[0]} is {height} × {width}: "
                "pass image_size (--image-size) to bring all to one size"
            )
        images[i] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def open_image(file: str) -> Image:
    """One image as RGB, by Pillow, which refuses a truncated JPEG. torchvision's own decoder is faster, but deprecated.

    Raises:
        InvalidInput: for a file that cannot be decoded.
    """
    from torchvision.datasets.folder import pil_loader

    try:
        return pil_loader(file)
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise InvalidInput(f"cannot read the image {file} ({error}): replace it, or remove it") from error


def _pixels(file: str, image_size: int | None) -> np.ndarray:
    """One image as RGB, (H, W, 3)."""
    from torchvision.transforms.functional import center_crop, resize

    image = open_image(file)
    if image_size is not None:
        image = center_crop(resize(image, image_size), image_size)
    return np.asarray(image)
