"""Images that are read as they go: PATH/<split>/<class>/*, of any number and size.

`data.load` keeps a whole set in memory, at one size; here each pass decodes every image anew, and a transform of the
model's own brings it to the size it takes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resode.data import folder
from resode.data.dataset import check_whole
from resode.data.sets import usable
from resode.errors import InvalidInput

LAYOUT = "expected PATH/<split>/<class>/*"

_BOTH_NAMES = {"validation": ("validation", "val"), "val": ("val", "validation")}


class ImageStream:
    """The images of one split of a folder, in batches (x, labels) on a device; every pass gives the same.

    The classes are the folders in PATH/<split>, in the order of their names, and labels count them from 0. The images
    come by turns: the first of each class in the order of the classes, then the second of each, and so on; a class that
    has no more is passed over. The images of a class are ordered by their paths. Nothing is random.

    Args:
        path: the folder.
        split: name of a folder in it; for "validation" and "val" either name will do.
        transform: from a PIL image (RGB) to a tensor; all of one shape.
        batch_size: images in a batch; the last may have fewer.
        limit: only the first ``limit`` images of that order: ⌊limit/classes⌋ of every class or one more, where none
            runs out. None for all.
        workers: processes that decode; 0 decodes in this one.
        device: where the batches go.

    ``names`` are those of the classes, ``classes`` their number, ``count`` is the number of images, ``len`` that of
    batches, and ``folder`` is where they lie.

    Raises:
        InvalidInput: for a folder that is not there or not laid out so, a class without images, a device that cannot be
            used, or a number out of its range; and while reading, for an image that cannot be decoded, or images that
            the transform leaves at different shapes.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int = 64,
        limit: int | None = None,
        workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        from torch.utils.data import DataLoader, Subset
        from torchvision.datasets import ImageFolder  # here, because it takes seconds that others need not wait

        check_whole(batch_size, "batch_size")
        if limit is not None:
            check_whole(limit, "limit")
        if not isinstance(workers, int) or workers < 0:
            raise InvalidInput(f"workers is {workers!r}: it must be a whole number from 0 on")
        self.device = usable(device)
        self.folder = place = _split_folder(Path(path).expanduser(), split)
        self.names = tuple(folder.class_names(place, LAYOUT))
        images = ImageFolder(str(place), transform, loader=folder.open_image, allow_empty=True)
        if empty := sorted(set(range(self.classes)) - set(images.targets)):
            raise InvalidInput(
                f"there is no image in {place / self.names[empty[0]]}: put some there, or remove the folder"
            )
        order = _by_turns(images.targets)[:limit]
        self.count = len(order)
        self._loader = DataLoader(
            Subset(images, order),
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # each pass draws a seed for the workers: from this, not from the global state
        )

    @property
    def classes(self) -> int:
        return len(self.names)

    def require_classes(self, classes: int) -> None:
        """Check that there are as many classes as a model has.

        Raises:
            InvalidInput: if not.
        """
        if classes != self.classes:
            raise InvalidInput(
                f"{self.folder} holds {self.classes} classes, and the model has {classes}: choose the data that the "
                "model was trained on"
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for x, labels in self._loader:
                yield x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except InvalidInput as problem:
            # A worker's comes with the traceback of its process, and the message last.
            raise InvalidInput(str(problem).rpartition("InvalidInput: ")[2].strip()) from problem


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise InvalidInput(f"there is no folder {path}: {LAYOUT}")
    for name in _BOTH_NAMES.get(split, (split,)):
        if (path / name).is_dir():
            return path / name
    there = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "no folders"
    raise InvalidInput(f"there is no split {split!r} in {path} (it holds {there}): {LAYOUT}")


def _by_turns(labels: Sequence[int]) -> list[int]:
    """The places of ``labels``: the first of each label, the second of each, …"""
    met: dict[int, int] = {}
    turns = []
    for label in labels:
        met[label] = met.get(label, 0) + 1
        turns.append((met[label], label))
    return sorted(range(len(labels)), key=turns.__getitem__)


def _collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    shapes = sorted({tuple(x.shape) for x, _ in samples})
    if len(shapes) > 1:
        raise InvalidInput(
            f"the transform gives images of shapes {shapes[0]} and {shapes[1]}: let it resize and crop them to one"
        )
    return torch.stack([x for x, _ in samples]), torch.tensor([label for _, label in samples])
