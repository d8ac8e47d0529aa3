"""Many changed networks on one batch: each forks from the running baseline at the first step in which it differs.

A network of L steps, and a change of step i, share the states before i. So the baseline's state is carried along, and
each changed network is run from where it forks: L deletions cost L·(L + 1)/2 evaluations of a step in place of L², and
no state is kept but those of the networks that run now. On a GPU several run at once, stacked in the batch, as far as
they use the same step: small images fill it only so.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resode.dynamics import ResidualDynamics, Step

Steps = Sequence[Step]
GPU_PIXELS = 4096 * 32 * 32
"""Pixels of a stacked batch, by default: as many as in 4096 images of CIFAR, with which its nets fill a GPU."""


class Answer(NamedTuple):
    """Logits of the network of this index; None stands for the baseline."""

    network: int | None
    logits: Tensor


def default_streams(x: Tensor) -> int:
    """How many networks to stack on inputs (B, C, H, W) or (B, C): one on a CPU, whose cores a batch fills; on a GPU
    as many as make up GPU_PIXELS."""
    return 1 if x.device.type == "cpu" else max(1, GPU_PIXELS // max(1, len(x) * x.shape[2:].numel()))


def fork(view: ResidualDynamics, steps: Steps) -> int:
    """The first place where ``steps`` differ from those of ``view`` (their number, if nowhere)."""
    places = (i for i, (own, other) in enumerate(zip(view.steps, steps, strict=True)) if own is not other)
    return next(places, len(view.steps))


def answers(view: ResidualDynamics, networks: Sequence[Steps], x: Tensor, streams: int = 1) -> Iterator[Answer]:
    """Logits on ``x`` of the baseline ``view``, and of the same with other steps for each of ``networks``.

    Args:
        networks: the steps of each, as many as the baseline has; steps that are the same objects are shared.
        streams: how many networks run at once.

    They come in the order of their forks; that of the baseline is the last.
    """
    forks = [fork(view, steps) for steps in networks]
    order = sorted(range(len(networks)), key=forks.__getitem__)
    h, at = view.stem(x), 0
    for first in range(0, len(order), streams):
        group = order[first : first + streams]
        running = _Running(view, len(h))
        for network in group:
            # The baseline goes on alone to the next fork, and those that have left it come along.
            running.run(at, forks[network])
            h, at = view.run(h, at, forks[network]), forks[network]
            running.join(network, networks[network], h)
        running.run(at, len(view.steps))
        yield from running.answers()
    yield Answer(None, view.head(view.run(h, at)))


class _Running:
    """Networks that run together, their states stacked along the batch."""

    def __init__(self, view: ResidualDynamics, batch: int) -> None:
        self.view, self.batch = view, batch
        self.members: list[tuple[int, Steps]] = []
        self.states: Tensor | None = None

    def join(self, network: int, steps: Steps, h: Tensor) -> None:
        # A copy: what follows may overwrite it (an activation with inplace=True), and the baseline goes on from h.
        self.members.append((network, steps))
        self.states = h.clone() if self.states is None else torch.cat([self.states, h])

    def run(self, start: int, stop: int) -> None:
        """Make the steps from ``start`` to ``stop``."""
        for place in range(start, stop if self.members else start):
            steps = [steps[place] for _, steps in self.members]
            if all(step is steps[0] for step in steps):
                self.states = steps[0](self.states)
            else:
                self.states = self._apart(steps)

    def _apart(self, steps: list[Step]) -> Tensor:
        """Each kind of step on the states that take it; all again in their order."""
        places: dict[int, list[int]] = {}
        for i, step in enumerate(steps):
            places.setdefault(id(step), []).append(i)
        parts = self.states.split(self.batch)
        after: list[Tensor] = [self.states] * len(steps)
        for members in places.values():
            out = steps[members[0]](_stack([parts[i] for i in members]))
            for i, part in zip(members, out.split(self.batch), strict=True):
                after[i] = part
        return _stack(after)

    def answers(self) -> Iterator[Answer]:
        logits = self.view.head(self.states).split(self.batch)
        for (network, _), part in zip(self.members, logits, strict=True):
            yield Answer(network, part)


def _stack(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)
