"""What can be asked of a net and its data in a minute, and costs hours if it is not.

The questions are those of Karpathy's recipe (2019, "A Recipe for Training Neural Networks", sections 1 to 3), each with
a number to answer it. Most work on a copy of the net, in which batch norms normalize by the moments of the batch, as
in training, and all that draws at random (dropout, noise, random ends of solves) is in evaluation mode.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks.ode import ode_blocks
from resode.data.dataset import DataSet
from resode.seeding import seeded
from resode.train.frozen import is_frozen
from resode.train.losses import training_loss

Batches = Iterator[tuple[Tensor, Tensor]]
"""Inputs (B, …) and labels (B,)."""

RATES = (1e-3, 1e-2)
"""Learning rates of Adam that are tried: nets for images learn by the first, those of two coordinates by the second."""
OVERFITTED = 0.95
"""Share of a batch that has to be answered right: one of 32 samples may have the wrong label."""
FACTOR = 2.0
"""How far, as a factor, the loss at initialization may be from that of equal probabilities."""
SURE = 3.0
"""Standard errors by which a mean has to differ from 0."""
ROUNDING = 1e-6
"""Share of the gradient's norm below which a parameter's is told to be near rounding."""
WARM = 5
"""Steps within which every parameter has to get a gradient; at first a learned scale of 0 keeps it from its branch."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Args:
        name: what was asked.
        passed: whether all is well.
        said: the answer in words and numbers, as a sentence without its full stop.
        values: the numbers.
    """

    name: str
    passed: bool
    said: str
    values: dict[str, Any] = field(default_factory=dict)


def steady(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for training without chance: see the head of this module."""
    twin = copy.deepcopy(model).eval()
    for layer in twin.modules():
        if isinstance(layer, _BatchNorm) and not is_frozen(layer):
            layer.train()
    for block in ode_blocks(twin).values():
        block.compile_mode = None  # a graph costs more than so few steps save
    return twin


def loss_at_initialization(model: nn.Module, x: Tensor, labels: Tensor, loss: str = "cross-entropy") -> Finding:
    """Whether the loss begins near that of equal probabilities: log K, or log 2 for binary cross-entropy.

    One far above begins with confident wrong answers, of a biased or badly scaled last layer, and the first epochs are
    spent on unlearning them; one far below knows the labels already. With independent normal logits of variance s² the
    cross-entropy is about log K + s²/2.

    Args:
        x: inputs (B, …); labels: (B,).
    """
    with torch.no_grad():
        logits = steady(model)(x).float()
        found = float(training_loss(logits, labels, loss))
    chances, said = (2, "log 2") if loss == "bce" else (logits.shape[1], f"log {logits.shape[1]}")
    expected, spread = math.log(chances), float(logits.std())
    passed = expected / FACTOR <= found <= expected * FACTOR
    said = f"{found:.3f}, and equal probabilities give {said} = {expected:.3f} (logits vary by {spread:.3g})"
    if not passed and found < expected:
        said += ": the answers are in the inputs, or in the weights"
    elif not passed:
        said += (
            ": scale the last layer down (in a deep net the branches: --scale 1/L, skipinit), use a norm, or warm up"
        )
    return Finding("loss at initialization", passed, said, {"loss": found, "expected": expected, "logits_std": spread})


def overfits_one_batch(
    model: nn.Module, x: Tensor, labels: Tensor, loss: str = "cross-entropy", steps: int = 300
) -> Finding:
    """Whether ``steps`` steps of Adam on one batch, without augmentation and dropout, answer all of it right.

    If they do not, the net cannot tell the samples apart, or the gradient is not that of the loss. The value
    ``rate`` is the learning rate of `RATES` by which it went best.
    """
    tried = []
    for rate in RATES:
        accuracies = []
        for _, right in _steps(steady(model), x, labels, loss, rate, steps):
            accuracies.append(right)
            if right == 1.0:
                break
        best = max(accuracies)
        tried.append((best, -accuracies.index(best), rate))
        if best == 1.0:
            break
    best, before, rate = max(tried)
    passed = best >= OVERFITTED
    said = f"{best:.0%} of {len(labels)} samples right after {-before} steps of Adam (learning rate {rate:g})"
    if not passed:
        said += ": the net, its loss or its gradients are wrong, or equal inputs have different labels"
    return Finding("overfits one batch", passed, said, {"accuracy": best, "steps": -before, "rate": rate})


def learns_from_the_inputs(
    model: nn.Module,
    batches: Callable[[], Batches],
    held: tuple[Tensor, Tensor],
    loss: str = "cross-entropy",
    rate: float = RATES[0],
    steps: tuple[int, ...] = (100, 300),
) -> Finding:
    """Whether the net learns more of the inputs than of inputs that are all 0 (the mean image).

    Two copies take the same ``steps`` of Adam, one with zeros for inputs, which can learn no more than how frequent the
    classes are. On samples held out the loss of the other has to be lower, by three standard errors of the mean of the
    differences. If it is not, after any of the numbers of ``steps``, the labels have nothing to do with the inputs, or
    the inputs are lost on their way through the net.

    Args:
        batches: gives an endless iterator over (x, labels), the same at each call.
        held: x and labels that are not among these.
    """
    x, labels = held
    nets = steady(model), steady(model)
    runs = [_train(net, _scaled(batches(), scale), loss, rate) for net, scale in zip(nets, (1.0, 0.0), strict=True)]
    done, passed, values = 0, False, {}
    for until in steps:
        for run in runs:
            for _ in range(until - done):
                next(run)
        done = until
        with torch.no_grad():
            logits = [net(scale * x).double() for net, scale in zip(nets, (1.0, 0.0), strict=True)]
        seeing, blind = (F.cross_entropy(z, labels, reduction="none") for z in logits)
        lead, error = float((blind - seeing).mean()), float((blind - seeing).std()) / math.sqrt(len(labels))
        values = {"steps": done, "loss": float(seeing.mean()), "loss_without_inputs": float(blind.mean())}
        passed = lead > SURE * error
        if passed:
            break
    said = (
        f"loss {values['loss']:.3f} on {len(labels)} samples held out after {done} steps, and "
        f"{values['loss_without_inputs']:.3f} with inputs of zeros (lead {lead:.3f} ± {error:.3f})"
    )
    if not passed:
        said += ": the labels may not belong to the inputs (look at the picture), or the inputs are lost on the way"
    return Finding("learns from the inputs", passed, said, {**values, "lead": lead, "standard_error": error})


def keeps_samples_apart(model: nn.Module, x: Tensor) -> Finding:
    """Whether the answer to a sample depends on it, and on no other sample of the batch.

    G_ij = ‖∂(v·z_i)/∂x_j‖, with v random, has to be exactly 0 for i ≠ j, and not 0 for i = j, in evaluation. Batch norm
    mixes the samples in training, and nothing else may: the share of Σ G² off the diagonal is told, and has to be 0
    without one.

    Args:
        x: inputs (B, …); B of 4 is enough, and B gradients are computed.
    """
    still, moving = copy.deepcopy(model).eval(), copy.deepcopy(model).train()
    for twin in (still, moving):
        for block in ode_blocks(twin).values():
            block.compile_mode = None
    evaluated, trained = (_dependence(twin, x) for twin in (still, moving))
    normed = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and not is_frozen(layer)]
    own, across = float(evaluated.diagonal().min()), _off_diagonal(evaluated)
    mixed = _off_diagonal(trained) / float(trained.square().sum()) if trained.any() else 0.0
    faults = []
    if not (evaluated.isfinite().all() and trained.isfinite().all()):
        faults.append("a gradient is not finite")
    if across > 0.0:
        faults.append("in evaluation, too: a mean or a reshape goes over the batch")
    if own == 0.0:
        faults.append("an answer does not depend on its own input")
    if mixed > 0.0 and not normed:
        faults.append("in training it does, and there is no batch norm")
    share = across / float(evaluated.square().sum()) if evaluated.any() else 0.0
    said = f"gradient of an answer by other samples: {share:.2g} of its square in evaluation, {mixed:.2g} in training"
    if normed and not faults:
        said += ", by batch norm"
    values = {"share_in_evaluation": share, "share_in_training": mixed, "least_own": own, "batch_norms": len(normed)}
    return Finding("keeps samples apart", not faults, ": ".join([said, *faults][:2]), values)


def _off_diagonal(G: Tensor) -> float:
    return float((G - G.diagonal().diag()).square().sum())


def _dependence(model: nn.Module, x: Tensor) -> Tensor:
    """G_ij = ‖∂(v·z_i)/∂x_j‖, (B, B)."""
    rows = []
    for i in range(len(x)):
        with seeded(0, x.device):  # the same masks for each
            at = x.detach().clone().requires_grad_()
            z = model(at)[i].double()
            v = torch.randn(z.shape, generator=torch.Generator().manual_seed(i), dtype=z.dtype).to(z.device)
            (gradient,) = torch.autograd.grad((v * z).sum(), at, allow_unused=True, materialize_grads=True)
            rows.append(gradient.flatten(1).double().norm(dim=1).cpu())
    return torch.stack(rows)


def statistics_of_inputs(data: DataSet, limit: int = 4096) -> Finding:
    """Whether the inputs are what nets are made for: of mean 0 and deviation 1 in each channel, and every class there.

    The training split is at fault beyond a mean of ±0.25 or a deviation outside [0.8, 1.25] (or of 0), the others
    beyond ±0.5 and [0.5, 2]: images that are differently scaled, as by a factor of 255, or not standardized.

    Args:
        limit: of each split so many samples are looked at, evenly spaced.
    """
    faults, values = [], {}
    for name, off, spread in (("train", 0.25, 1.25), ("validation", 0.5, 2.0), ("test", 0.5, 2.0)):
        split = getattr(data, name)
        if not len(split):
            continue
        places = torch.arange(0, len(split), -(-len(split) // limit), device=split.labels.device)
        x = data.standardize(split.take(places).inputs).double()
        std, mean = torch.std_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        counts = torch.bincount(split.labels.clamp_min(0), minlength=data.classes)
        values[name] = {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "least": float(x.min()),
            "greatest": float(x.max()),
            "counts": counts.tolist(),
        }
        if not x.isfinite().all():
            faults.append(f"inputs of the {name} split are not finite")
        elif float(mean.abs().max()) > off or float(std.max()) > spread or float(std.min()) < 1 / spread:
            faults.append(f"the {name} split is not standardized (or a channel is constant)")
        if len(counts) > data.classes or int(split.labels.min()) < 0:
            faults.append(f"labels of the {name} split are not all in 0 … {data.classes - 1}")
        elif name == "train" and not counts.all():
            faults.append(f"class {int((counts == 0).nonzero()[0])} has no sample to train on")
    train = values["train"]
    said = (
        f"mean {_span(train['mean'])}, deviation {_span(train['std'])}, range {train['least']:.2f} … "
        f"{train['greatest']:.2f}; {data.classes} classes of {min(train['counts'])} to {max(train['counts'])} samples"
    )
    return Finding("statistics of the inputs", not faults, ": ".join([said, *faults[:1]]), values)


def _span(values: list[float]) -> str:
    low, high = (f"{round(value, 2) + 0.0:.2f}" for value in (min(values), max(values)))  # and no "-0.00"
    return low if low == high else f"{low} to {high}"


def every_parameter_gets_a_gradient(
    model: nn.Module, x: Tensor, labels: Tensor, loss: str = "cross-entropy"
) -> Finding:
    """Whether each trained parameter gets a finite gradient, and in the first five steps once one that is not 0.

    A parameter without takes no part in the answer: a layer that is never called, one cut off by ``detach``, one whose
    activations are all dead, or (as for a time channel that is asked at t = 0 only) one that is multiplied by 0.
    """
    twin = steady(model)
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    met, first, bad = set(), {}, set()
    for _ in _steps(twin, x, labels, loss, RATES[0], WARM):
        norms = {name: float(p.grad.norm()) for name, p in trained.items() if p.grad is not None}
        first = first or norms
        bad |= {name for name, norm in norms.items() if not math.isfinite(norm)}
        met |= {name for name, norm in norms.items() if norm != 0.0}
    without = [name for name in trained if name not in met]
    whole = math.sqrt(sum(norm**2 for norm in first.values()))
    rounding = [name for name, norm in first.items() if name not in without and norm < ROUNDING * whole]
    said = f"{len(trained) - len(without)} of {len(trained)} parameters do, of norm {whole:.3g} in all at first"
    if bad:
        said += f": that of {_first(sorted(bad))} is not finite"
    elif without:
        said += f": {_first(without)} never does"
    elif rounding:
        said += f"; that of {_first(rounding)} is near rounding, as where a norm removes what a parameter adds"
    values = {"parameters": len(trained), "without": without, "rounding": rounding, "not_finite": sorted(bad)}
    return Finding("every parameter gets a gradient", not (bad or without), said, {**values, "norm": whole})


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


# --- training ---------------------------------------------------------------------------------------------------------


def _scaled(batches: Batches, scale: float) -> Batches:
    for x, labels in batches:
        yield scale * x, labels


def _steps(
    model: nn.Module, x: Tensor, labels: Tensor, loss: str, rate: float, steps: int
) -> Iterator[tuple[float, float]]:
    """``steps`` of :func:`_train` on one batch."""
    return islice(_train(model, repeat((x, labels)), loss, rate), steps)


def _train(model: nn.Module, batches: Batches, loss: str, rate: float) -> Iterator[tuple[float, float]]:
    """A step of Adam for each of ``batches``: loss and accuracy before it. The gradients are there until the next."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for x, labels in batches:
        logits = model(x)
        found = training_loss(logits, labels, loss)
        optimizer.zero_grad()
        if found.requires_grad:
            found.backward()
        optimizer.step()
        yield float(found.detach()), float((logits.argmax(1) == labels).double().mean())
