"""Ensembles of sub-networks: what is left of a network when a random part of its branches is taken away.

A sub-network keeps each of some residual steps and is the shortcut at the others. Of the 2^n sub-networks of n steps,
:func:`subnetworks` draws some, and averages their predicted probabilities. They are no paths: a network's output is no
sum over paths (a branch is applied to the sum of all that comes to it), only its gradient is (see ``paths.spectrum``).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resode.dynamics import ResidualDynamics
from resode.errors import InvalidInput
from resode.paths import streams as running
from resode.paths.interventions import delete
from resode.paths.lesion import Data
from resode.paths.places import require_view
from resode.paths.scores import Score, Tallies
from resode.paths.study import require_pair


@dataclass(frozen=True)
class Ensemble:
    """``size`` sub-networks, their predicted probabilities averaged."""

    size: int
    score: Score


@dataclass(frozen=True)
class EnsembleTable:
    """The whole network, single sub-networks, and ensembles of them.

    Args:
        whole: the network itself.
        kept: how many steps each sub-network keeps, of how many.
        members: each sub-network by itself.
        ensembles: of the first of them, for each size asked for.
    """

    whole: Score
    kept: tuple[tuple[int, ...], ...]
    steps: int
    members: tuple[Score, ...]
    ensembles: tuple[Ensemble, ...]

    @property
    def member_error(self) -> float:
        """The mean error of a sub-network by itself."""
        return mean(score.error for score in self.members)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EnsembleTable":
        """The inverse of :meth:`to_dict`."""
        return cls(
            Score.from_dict(values["whole"]),
            tuple(tuple(kept) for kept in values["kept"]),
            values["steps"],
            tuple(Score.from_dict(score) for score in values["members"]),
            tuple(Ensemble(e["size"], Score.from_dict(e["score"])) for e in values["ensembles"]),
        )


def subnetworks(
    view: ResidualDynamics,
    data: Data,
    sizes: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    keep: int | float = 0.5,
    seed: int = 0,
    by_class: bool = False,
    streams: int | None = None,
    progress: bool = False,
) -> EnsembleTable:
    """Error and loss of ensembles of sampled sub-networks, with nothing retrained.

    Args:
        view: the network.
        data: pairs (x, labels).
        sizes: numbers of sub-networks whose probabilities are averaged.
        keep: how many of the residual steps a sub-network keeps; below 1, the probability with which it keeps each.
        seed: of the draws.
        by_class, streams, progress: as in :class:`resode.paths.lesion.How`.

    Raises:
        InvalidInput: for anything but a view, a network without residual steps, sizes below 1, a number of steps it
            does not have, or data that are empty or no such pairs.
    """
    require_view(view, "an ensemble of sub-networks")
    choices = [i for i, step in enumerate(view.steps) if step.has_choice]
    if not choices:
        raise InvalidInput("this network has no residual step, and so no sub-networks")
    if not sizes or min(sizes) < 1:
        raise InvalidInput(f"sizes of ensembles are {list(sizes)}: at least 1 is expected")
    if not (0 < keep < 1 or (isinstance(keep, int) and 0 <= keep <= len(choices))):
        raise InvalidInput(
            f"keep is {keep}: a probability in (0, 1), or a number of steps from 0 to {len(choices)}, is expected"
        )
    drawn = random.Random(seed)
    kept = [_draw(choices, keep, drawn) for _ in range(max(sizes))]
    networks = []
    for own in kept:
        gone = [i for i in choices if i not in own]
        networks.append((delete(*gone)(view) if gone else view).steps)
    count = len(networks)
    tallies = Tallies(1 + count + len(sizes), by_class)
    with view.evaluation():
        bar = tqdm(data, desc="sub-networks", unit="batch", leave=False, disable=None if progress else True)
        for batch in bar:
            require_pair(batch)
            x, labels = batch
            found = dict(running.answers(view, networks, x, streams or running.default_streams(x)))
            tallies.begin(labels, found[None].shape[1])
            tallies.add(0, found[None], labels)
            for i in range(count):
                tallies.add(1 + i, found[i], labels)
            for place, size in enumerate(sizes):
                tallies.add(1 + count + place, log_mean_probability([found[i] for i in range(size)]), labels)
    whole, *rest = tallies.scores()
    ensembles = tuple(Ensemble(size, score) for size, score in zip(sizes, rest[count:], strict=True))
    return EnsembleTable(whole, tuple(tuple(sorted(own)) for own in kept), len(choices), tuple(rest[:count]), ensembles)


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """log((1/k) Σ softmax(z_i)): what, as logits, has the averaged probabilities."""
    return torch.stack([z.float().log_softmax(1) for z in logits]).logsumexp(0) - torch.tensor(float(len(logits))).log()


def _draw(choices: Sequence[int], keep: int | float, drawn: random.Random) -> set[int]:
    if isinstance(keep, int):
        return set(drawn.sample(choices, keep))
    return {i for i in choices if drawn.random() < keep}
