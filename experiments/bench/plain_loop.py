"""The training loop as most people write it with torch and torchvision, to compare ours with.

Every image is made a PIL image, cropped, flipped and standardized by itself, on the CPU: between the steps, or ahead of
them by the worker processes of a ``DataLoader``. Every step reads the loss and the right answers from the device, and
SGD decays all parameters, those of the norms included.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from resode.data.dataset import DataSet
from resode.errors import InvalidInput, TrainingError
from resode.layers.layout import channels_last as laid_channels_last
from resode.seeding import seeded
from resode.train.metrics import nfe
from resode.train.progress import Bar
from resode.train.recipe import PRECISIONS

PADDING = 4
"""Of the crop, as in He et al. 2016, section 4.2."""


class Images(Dataset):
    """The training split of ``data``, as (augmented and standardized float32 (C, H, W), label).

    Pixels are kept as torchvision's CIFAR10 keeps them, in a uint8 array (N, H, W, C), or (N, H, W) of grey ones.

    Raises:
        InvalidInput: for points, or images of neither 1 nor 3 channels.
    """

    def __init__(self, data: DataSet) -> None:
        if data.size is None or data.channels not in (1, 3):
            what = "points" if data.size is None else f"images of {data.channels} channels"
            raise InvalidInput(f"{data.name} has {what}, of which no PIL images can be made: use grey or colour images")
        pixels = data.train.inputs.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.pixels: np.ndarray = pixels[..., 0] if data.channels == 1 else pixels
        self.labels: list[int] = data.train.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.size, padding=PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean.tolist(), data.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def make_loader(data: DataSet, batch_size: int, *, workers: int, seed: int, device: str | torch.device) -> DataLoader:
    """The full batches of one epoch of the training split, shuffled anew each time that it is gone through.

    The order is drawn from ``seed``, whatever the workers, and so is the augmentation in worker processes; without
    workers it is drawn from torch's default generator, as torchvision does. Workers are started with the first epoch
    and stay for the others, each a fresh process: a fork of one that has threads is not safe, on macOS least of all.

    Args:
        workers: processes that prepare batches; 0 prepares them in this one.
        device: where the batches will go: for CUDA they are prepared in pinned memory.

    Raises:
        InvalidInput: as :class:`Images`, for a batch larger than the split, or a number of workers below 0.
    """
    if not isinstance(workers, int) or workers < 0:
        raise InvalidInput(f"workers is {workers!r}: a whole number of at least 0 is expected")
    if not 1 <= batch_size <= len(data.train):
        raise InvalidInput(
            f"batch_size is {batch_size}, and the training split has {len(data.train)} images: a number from 1 to that "
            "is expected"
        )
    images = Images(data)
    # The order has a generator of its own: from the loader's, seeds of workers are drawn, too.
    return DataLoader(
        images,
        batch_size,
        sampler=RandomSampler(images, generator=torch.Generator().manual_seed(seed)),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator().manual_seed(seed),
    )


def train_epoch(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device,
    precision: str = "float32",
    channels_last: bool = False,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int, float, float], None] | None = None,
) -> tuple[float, float]:
    """Make a step with each of ``batches``; the mean loss and the accuracy, as seen while training.

    Args:
        forward: the net in training mode, compiled perhaps.
        precision: float32, or bfloat16 (autocast).
        channels_last: lay the images channels-last in memory.
        before_step: is told the number of each step, from 0 on.
        after_step: is told the number of images, and the mean loss and the accuracy so far.

    Raises:
        InvalidInput: when there is no batch.
        TrainingError: when the loss is no longer finite.
    """
    dtype, kind = PRECISIONS[precision], torch.device(device).type
    total, right, seen = 0.0, 0, 0
    for step, (x, labels) in enumerate(batches):
        if before_step is not None:
            before_step(step)
        x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if channels_last:
            x = laid_channels_last(x)
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not torch.float32):
            logits = forward(x)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss became {loss.item()} at step {step + 1} of an epoch: lower the learning rate"
            )
        total += loss.item() * len(labels)
        right += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
        if after_step is not None:
            after_step(len(labels), total / seen, right / seen)
    if seen == 0:
        raise InvalidInput("there is no batch to train on: give at least one")
    return total / seen, right / seen


def make_sgd(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """torch's SGD as it is by default, of all parameters, which all decay."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def train_plainly(
    model: nn.Module,
    data: DataSet,
    *,
    epochs: int,
    batch_size: int,
    lr_of_step: Callable[[int], float],
    weight_decay: float,
    momentum: float,
    workers: int,
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> list[dict[str, Any]]:
    """Train ``model`` in place on the training split of ``data``, cropped with a padding of 4 pixels and flipped.

    The global random state is left as it was.

    Args:
        lr_of_step: learning rate of an optimizer step, counted from 0 over all epochs.
        workers: see :func:`make_loader`.
        seed: of order, augmentation and dropout.
        device: where the model is trained; it is moved there.
        progress: show a bar where the output is a terminal, elsewhere a line an epoch.

    Returns:
        One record an epoch: epoch, lr (of its last step), train_loss, train_accuracy, nfe, seconds, images_per_second.

    Raises:
        InvalidInput: as :func:`make_loader`, or for no epochs.
        TrainingError: when the loss is no longer finite.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise InvalidInput(f"epochs is {epochs!r}: a whole number of at least 1 is expected")
    place = torch.device(device)
    loader = make_loader(data, batch_size, workers=workers, seed=seed, device=place)
    steps = len(loader)
    model.to(place).train()
    optimizer = make_sgd(model, lr=lr_of_step(0), momentum=momentum, weight_decay=weight_decay)
    records = []

    def tell(images: int, loss: float, accuracy: float) -> None:
        bar.batch(images, loss, accuracy, nfe(model))

    with seeded(seed, place), Bar(epochs, 0, steps * batch_size, progress) as bar:
        for epoch in range(epochs):
            begin, rate = time.perf_counter(), _Rate(optimizer, lr_of_step, epoch * steps)
            loss, accuracy = train_epoch(model, optimizer, loader, device=place, before_step=rate, after_step=tell)
            seconds = time.perf_counter() - begin
            record = {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": loss,
                "train_accuracy": accuracy,
                "nfe": nfe(model),
                "seconds": seconds,
                "images_per_second": steps * batch_size / seconds,
            }
            bar.epoch(record)
            records.append(record)
    return records


@dataclass(frozen=True)
class _Rate:
    """Sets the learning rate of a step, which is counted from ``first`` on."""

    optimizer: torch.optim.Optimizer
    lr_of_step: Callable[[int], float]
    first: int

    def __call__(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_of_step(self.first + step)
