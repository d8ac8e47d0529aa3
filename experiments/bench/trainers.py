"""The contenders of the trainer's benchmark. A turn of each is the same number of steps of SGD, of the same net."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.plain_loop import PADDING, make_loader, make_sgd, train_epoch
from resode.blocks.compiled import begin_graphs
from resode.data.augment import Augment
from resode.data.dataset import DataSet, moments
from resode.data.splits import Split
from resode.errors import TrainingError
from resode.layers.layout import channels_last, lay_channels_last
from resode.nets import NetConfig, build
from resode.nets.net import parameter_count
from resode.seeding import seeded
from resode.train.loop import fit
from resode.train.recipe import PRECISIONS, Recipe, make_optimizer

BARE, FIT, PLAIN = "bare step", "fit", "DataLoader loop"
PROJECTED, TIMM = "bare step, projections", "bare step, timm's net"
AUGMENT = Augment(flip=True, crop=PADDING)

Batch = tuple[Tensor, Tensor]


class Contender:
    """A way to train, with its net; to call it is to have a turn.

    Args:
        name: what to call it.
        model: its net.
        turn: makes the steps of a turn; the mean of their losses, or the last where nothing else is computed.

    ``losses`` are those of the turns so far.
    """

    def __init__(self, name: str, model: nn.Module, turn: Callable[[], float]) -> None:
        self.name, self.model, self.turn = name, model, turn
        self.parameters = parameter_count(model)
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Have a turn.

        Raises:
            TrainingError: when its loss is not finite.
        """
        loss = self.turn()
        if not math.isfinite(loss):
            raise TrainingError(f"{self.name}: the loss of a turn is {loss}: lower lr, or there is nothing to compare")
        self.losses.append(loss)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all contenders of a case train, and how.

    Args:
        net: the net; "pad" is its shortcut.
        recipe: precision, layout, batch size, seed, and SGD's settings; of one epoch.
        steps: of a turn: the training split has so many batches.
        compile: the mode in which torch.compile compiles the nets; False: they are not compiled.
        device: where the nets and, but for the DataLoader loop, the images are.
    """

    net: NetConfig
    recipe: Recipe
    steps: int
    compile: bool | str
    device: str

    @cached_property
    def data(self) -> DataSet:
        """Images of random pixels, which cost what photographs of their size do, and random labels."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        count, shape = self.steps * self.recipe.batch_size, (self.net.channels, *self.net.size)
        pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
        train = Split(pixels, torch.randint(self.net.classes, (count,), generator=generator))
        mean, std = (moment.to(self.device) for moment in moments(pixels))
        none = train.take(slice(0)).to(self.device)
        return DataSet("random images", train.to(self.device), none, none, self.net.classes, mean, std)

    @property
    def images(self) -> int:
        """Images that a net is trained on in a turn."""
        return self.steps * self.recipe.batch_size

    def built(self, config: NetConfig | None = None) -> nn.Module:
        """The net, or that of another ``config``, with the weights of the seed, as the recipe lays it in memory."""
        return self.laid(build(self.net if config is None else config, self.recipe.seed))

    def laid(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, as the recipe lays it in memory."""
        if self.recipe.channels_last:
            lay_channels_last(model)
        return model.to(self.device)

    def called(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """``model`` as it is called in training, once a step."""
        if not self.compile:
            return model.train()
        compiled = torch.compile(model.train(), mode=self.compile)

        def forward(x: Tensor) -> Tensor:
            begin_graphs(self.compile, x.device)
            return compiled(x)

        return forward


def contenders(subject: Subject, workers: Sequence[int]) -> list[Contender]:
    """All of them: the bare step, ours, the DataLoader loops, and for a residual net timm's beside one as large.

    Args:
        workers: of a DataLoader loop each.
    """
    found = [bare(subject, BARE, subject.built()), fitted(subject)]
    found += [plain(subject, each) for each in workers]
    if subject.net.net == "resnet" and timm_absent() is None:
        found += [
            bare(subject, PROJECTED, subject.built(replace(subject.net, shortcut="projection"))),
            bare(subject, TIMM, subject.laid(timm_net(subject.net, subject.recipe.seed))),
        ]
    return found


def fitted(subject: Subject) -> Contender:
    """``fit`` as its users call it: one epoch, its set-up included."""
    model, data, recipe = subject.built(), subject.data, subject.recipe

    def turn() -> float:
        return fit(model, data, recipe, augment=AUGMENT, compile=subject.compile)[-1]["train_loss"]

    return Contender(FIT, model, turn)


def bare(subject: Subject, name: str, model: nn.Module, batches: Sequence[Batch] | None = None) -> Contender:
    """Forward pass, loss, backward pass and the optimizer's step, on batches that are ready on the device.

    Args:
        batches: by default those of an epoch of the data, augmented and standardized.
    """
    recipe = subject.recipe
    forward, optimizer = subject.called(model), make_optimizer(recipe, model)
    if batches is None:
        generator = torch.Generator().manual_seed(recipe.seed)
        size = recipe.batch_size
        batches = list(subject.data.batches("train", size, generator=generator, augment=AUGMENT, drop_last=True))
    if recipe.channels_last:
        batches = [(channels_last(x), labels) for x, labels in batches]
    kind, dtype = torch.device(subject.device).type, PRECISIONS[recipe.precision]
    autocast = torch.autocast(kind, dtype=dtype, enabled=dtype is not torch.float32)

    def turn() -> float:
        for x, labels in batches:
            optimizer.zero_grad()
            with autocast:
                loss = F.cross_entropy(forward(x), labels)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return Contender(name, model, turn)


def plain(subject: Subject, workers: int) -> Contender:
    """One epoch of a loop with torchvision's transforms and a ``DataLoader``, whose workers stay from turn to turn.

    Its images come from the CPU, and its optimizer is torch's SGD as it is by default.
    """
    model, recipe, device = subject.built(), subject.recipe, subject.device
    loader = make_loader(subject.data, recipe.batch_size, workers=workers, seed=recipe.seed, device=device)
    optimizer = make_sgd(model, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    forward = subject.called(model)
    how = {"precision": recipe.precision, "channels_last": recipe.channels_last}

    def turn() -> float:
        return train_epoch(forward, optimizer, loader, device=device, **how)[0]

    return Contender(f"{PLAIN}, {workers} workers", model, turn)


def timm_absent() -> str | None:
    """Why timm's net takes no part; None where it does."""
    return None if find_spec("timm") is not None else "not installed"


def timm_net(config: NetConfig, seed: int) -> nn.Module:
    """The residual net of ``config`` out of timm's ``ResNet`` and ``BasicBlock``.

    timm's is for ImageNet: its blocks are counted for three stages in place of four, and its stem (7×7, stride 2, and a
    max pooling) gives way to a 3×3 convolution, as CIFAR's nets have it. What remains different from He's are the
    shortcuts into stages 2 and 3: 1×1 convolutions with a norm (option B), as with ``shortcut="projection"`` here.

    Args:
        config: of a resnet of branches of kind "basic" and an even width.
        seed: what the weights are drawn from; the global random state is left as it is.
    """
    from timm.models.resnet import BasicBlock, ResNet

    width, blocks = config.width, (config.depth - 2) // 6
    with seeded(seed):
        net = ResNet(
            BasicBlock,
            (blocks,) * 3,
            channels=(width, 2 * width, 4 * width),
            num_classes=config.classes,
            in_chans=config.channels,
            stem_type="deep",  # the one stem whose width can be chosen: that of the norm behind it, which stays
            stem_width=width // 2,
            zero_init_last=False,
        )
        net.conv1 = nn.Conv2d(config.channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool, net.layer4 = nn.Identity(), nn.Identity()
    return net
