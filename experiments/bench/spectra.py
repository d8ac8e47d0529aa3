"""The exact path spectrum of a residual net: what it costs beside a gradient, and beside sampling single paths."""

from collections.abc import Callable, Iterator
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.lesions import FAST, Subject
from experiments.bench.turns import Way
from resode.dynamics import ResidualDynamics, dynamics
from resode.dynamics.inference import inference
from resode.paths import lengths, spectrum

GRADIENT, EXACT, SAMPLED, ONE_BY_ONE = "forward and backward", "exact", "sampled", "sampled, one by one"
Loss = Callable[[Tensor], Tensor]


def ways(subject: Subject, samples: int) -> list[Way]:
    """One forward and backward pass of the net; its exact spectrum; and ``samples`` paths of each length.

    The exact spectrum and the sample of ``spectrum.sampled`` (one forward pass for all paths) are made of the net as it
    is and of a copy made for speed; one by one, each path takes a forward and a backward pass, as its definition says.
    The answer of the first three is the gradient in x, and a sample has none.
    """
    net, x = subject.net, subject.x
    labels = torch.arange(len(x), device=x.device) % 10

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")

    def gradient() -> Tensor:
        """Of the parameters, too, as in training."""
        net.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        loss(net(leaf)).backward()
        return leaf.grad

    def exact(view: ResidualDynamics) -> Tensor:
        return spectrum.gradient(view, x, loss).total

    def sampled(view: ResidualDynamics) -> None:
        spectrum.sampled(view, x, loss, samples=samples)

    plain, fast = dynamics(net), inference(net)
    parts = {"parts": len(plain.steps) + 1}
    drawn = parts | {"samples": samples, "paths": sum(1 for _ in draws(plain, samples, 0))}
    return [
        Way(GRADIENT, gradient, {}),
        Way(EXACT, lambda: exact(plain), parts),
        Way(f"{EXACT}, {FAST}", lambda: exact(fast), parts),
        Way(SAMPLED, lambda: sampled(plain), drawn),
        Way(f"{SAMPLED}, {FAST}", lambda: sampled(fast), drawn),
        Way(ONE_BY_ONE, lambda: one_by_one(plain, x, loss, samples), drawn),
    ]


def one_by_one(view: ResidualDynamics, x: Tensor, loss: Loss, samples: int, seed: int = 0) -> None:
    """The norms of sampled paths' gradients, each by a forward and a backward pass."""
    for path in draws(view, samples, seed):
        path_gradient(view, x, loss, path).flatten(1).norm(dim=1).mean()


def path_gradient(view: ResidualDynamics, x: Tensor, loss: Loss, path: set[int]) -> Tensor:
    """The gradient in ``x`` of the path through the branches of the steps in ``path`` and round all others.

    The states are those of the whole network; what the path does not go through passes no gradient.
    """
    leaf = x.detach().requires_grad_()
    h = view.stem(leaf)
    for i, step in enumerate(view.steps):
        with torch.set_grad_enabled(i in path):
            branch = step.scale * step.branch(step.t, h)
        shortcut = step.shortcut(h)
        h = step.post(branch + (shortcut.detach() if i in path else shortcut))
    (gradient,) = torch.autograd.grad(loss(view.head(h)), leaf)
    return gradient


def draws(view: ResidualDynamics, samples: int, seed: int) -> Iterator[set[int]]:
    """``samples`` paths of each length, or all where there are fewer; of a net whose every step leaves the choice."""
    random, steps = Random(seed), range(len(view.steps))
    for length, count in enumerate(lengths.counts(view)):
        for _ in range(min(count, samples)):
            yield set(random.sample(steps, length))


def distance(found: Tensor, reference: Tensor) -> float:
    """‖found − reference‖/‖reference‖."""
    return float((found.double() - reference.double()).norm() / reference.double().norm())
