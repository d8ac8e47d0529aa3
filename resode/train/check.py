"""``check``: what an expert does before a long training, as a list of findings and a picture.

The questions are in ``train.findings``; here they are asked of a net, its data and its recipe.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resode import nets
from resode.data.augment import Augment
from resode.data.dataset import DataSet
from resode.data.splits import Split
from resode.errors import InvalidInput
from resode.seeding import seeded
from resode.train import findings
from resode.train.findings import Finding, steady
from resode.train.loop import check_fit
from resode.train.losses import training_loss
from resode.train.recipe import Recipe
from resode.train.session import Setup, check_device

BATCH, LEAST = 64, 8
"""Samples of a batch, and of the whole training split at least."""
OVERFITTED = 32
"""Samples of the batch that shall be overfitted."""
HELD = 512
"""Samples that are held out of the training split to compare on, at most; a quarter of it if that is less."""
PICTURED, SIDE = 16, 64
"""Images of the picture, and the pixels of their longer side, at most."""
EDGES = torch.linspace(-5.0, 5.0, 51)
"""Edges of the histograms of activations; what lies beyond counts in the outermost."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        findings: one for each question.
        picture: plain values for ``plots.check``: the inputs as the net sees them in training (augmented images, in
            [0, 255], or points) with their labels, the outputs of each layer on them, and the gradient of each weight.
    """

    findings: tuple[Finding, ...]
    picture: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return all(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"passed": self.passed, "findings": [asdict(f) for f in self.findings], "picture": self.picture}


def check(setup: Setup, device: str = "cpu", *, tell: Callable[[Finding], None] | None = None) -> Report:
    """Ask all the questions of the training that ``setup`` describes. Nothing is trained but copies.

    Args:
        tell: called with each finding as soon as there is one.

    Raises:
        InvalidInput: for settings that do not fit each other or the data, as in ``train``.
    """
    place, recipe = check_device(device), setup.recipe
    dataset = setup.data.load(recipe.seed, place)
    model = nets.build(setup.net_config(dataset), recipe.seed).to(place)
    check_fit(model, dataset, recipe)
    return check_model(model, dataset, recipe, augment=setup.stack.augment, tell=tell)


def check_model(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    *,
    augment: Augment | None = None,
    tell: Callable[[Finding], None] | None = None,
) -> Report:
    """:func:`check` of a ``model`` of any make, on the device of ``data``; model and random state stay as they were.

    Raises:
        InvalidInput: for a training split of less than 8 samples, or a model with nothing to train.
    """
    if len(data.train) < LEAST:
        raise InvalidInput(
            f"the training split has {len(data.train)} samples: at least {LEAST} are needed, some of them to hold out"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput(f"this {type(model).__name__} has no parameter that requires a gradient: nothing to train")
    device = data.train.inputs.device
    with seeded(recipe.seed, device), torch.enable_grad():
        made = []
        for finding in _findings(model, data, recipe):
            made.append(finding)
            if tell is not None:
                tell(finding)
        return Report(tuple(made), picture(model, data, recipe, augment))


def _findings(model: nn.Module, data: DataSet, recipe: Recipe) -> Iterator[Finding]:
    yield findings.statistics_of_inputs(data)
    order = torch.randperm(len(data.train), generator=_generator(recipe)).to(data.train.labels.device)
    count = min(HELD, len(order) // 4)
    held, kept = data.train.take(order[:count]), data.train.take(order[count:])
    batch = min(BATCH, len(kept))
    x, labels = _ready(data, kept.take(slice(batch)))
    yield findings.loss_at_initialization(model, x, labels, recipe.loss)
    yield findings.every_parameter_gets_a_gradient(model, x, labels, recipe.loss)
    yield findings.keeps_samples_apart(model, x[:4])
    overfits = findings.overfits_one_batch(model, x[:OVERFITTED], labels[:OVERFITTED], recipe.loss)
    yield overfits

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = _generator(recipe)
        while True:
            yield from data.batches(kept, batch, generator=generator, drop_last=True)

    rate = overfits.values["rate"]
    yield findings.learns_from_the_inputs(model, batches, _ready(data, held), recipe.loss, rate)


def _generator(recipe: Recipe) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.seed)


def _ready(data: DataSet, split: Split) -> tuple[Tensor, Tensor]:
    return data.standardize(split.inputs), split.labels


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(model: nn.Module, data: DataSet, recipe: Recipe, augment: Augment | None = None) -> dict[str, Any]:
    """A batch as the net sees it, as plain values: see :class:`Report`."""
    size = min(BATCH, len(data.train))
    x, labels = next(data.batches("train", size, generator=_generator(recipe), augment=augment, epoch=0))
    twin = steady(model)
    outputs = _outputs(twin, x)
    training_loss(twin(x), labels, recipe.loss).backward()
    weights = [(name, p) for name, p in twin.named_parameters() if p.ndim > 1 and p.grad is not None]
    some = x[:PICTURED]
    return {
        "inputs": some.tolist() if data.size is None else _pixels(data, some),
        "labels": (labels if labels.ndim == 1 else labels.argmax(1))[:PICTURED].tolist(),
        "edges": EDGES.tolist(),
        "outputs": outputs,
        "gradients": [
            {"name": n, "norm": float(p.grad.norm()), "weight": float(p.detach().norm())} for n, p in weights
        ],
    }


def _pixels(data: DataSet, x: Tensor) -> list[Any]:
    """Standardized images as they looked before, (B, C, H, W) in 0 … 255."""
    mean, std = (moment.view(-1, 1, 1) for moment in (data.mean, data.std))
    images = (x * std + mean).clamp(0.0, 1.0)
    if (side := max(images.shape[2:])) > SIDE:
        images = F.interpolate(images, scale_factor=SIDE / side, mode="area")
    return images.mul(255).round().to(torch.uint8).tolist()


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Mean, deviation and histogram of what each convolution and linear layer of ``model`` gives.

    A layer that is called several times (in a solve) is seen as it was at the last.
    """
    met: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, inputs, output: met.__setitem__(name, output.detach().float())

    twin = copy.deepcopy(model)
    for name, layer in twin.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            layer.register_forward_hook(note(name))
    twin(x)
    return [
        {
            "name": name,
            "mean": float(output.mean()),
            "std": float(output.std()),
            "shares": _shares(output.flatten()),
        }
        for name, output in met.items()
    ]


def _shares(values: Tensor) -> list[float]:
    """The share of the ``values`` between each two of `EDGES`."""
    edges = EDGES.to(values.device)
    places = torch.bucketize(values.nan_to_num().clamp(edges[0], edges[-1]), edges[1:-1])
    return (torch.bincount(places, minlength=len(EDGES) - 1).double() / len(values)).tolist()
