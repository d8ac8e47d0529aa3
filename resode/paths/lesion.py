"""Lesions: what a trained network does without some of its steps, which it was never trained to do without.

Veit, Wilber & Belongie 2016, arXiv 1605.06431, section 4: a residual net loses little when one block is deleted, since
half of its 2^L paths remain (:func:`single`); its error grows smoothly with the number of blocks deleted
(:func:`multiple`) or put out of order (:func:`permute`). A plain net has one path, and falls to chance.

Each analysis goes through the data once. For many lesions of a large network it takes ``resume=PATH``: the sums so far
are kept there, and an analysis that was interrupted goes on from them to the same numbers.
"""

import random
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypedDict, Unpack

from scipy.stats import kendalltau
from torch import Tensor
from tqdm import tqdm

from resode.dynamics import ResidualDynamics, Step
from resode.errors import InvalidInput
from resode.paths import streams
from resode.paths.interventions import Intervention, Stage, delete, select
from resode.paths.progress import Progress, fingerprint
from resode.paths.scores import Score, Tallies
from resode.paths.table import Lesion, LesionTable

Data = Iterable[tuple[Tensor, Tensor]]


class How(TypedDict, total=False):
    """How an analysis is made.

    Args:
        by_class: measure the error of each class, too.
        streams: how many lesioned networks run at once, stacked in the batch; by default 1 on a CPU, and on a GPU as
            many as make up 4096 images. The results differ by rounding alone.
        progress: show a progress bar (on a terminal).
        resume: a file for the sums so far.
    """

    by_class: bool
    streams: int | None
    progress: bool
    resume: str | Path | None


def single(
    view: ResidualDynamics,
    data: Data,
    **how: Unpack[How],
) -> LesionTable:
    """Delete one step at a time, and measure error and loss on ``data`` (Veit et al. 2016, figure 3).

    Args:
        view: the network.
        data: pairs (x, labels).
        how: see :class:`How`.

    A transition, or a plain layer that changes the shape of the state, cannot be deleted: its lesion has no score.

    Raises:
        InvalidInput: when ``data`` is empty, or ``resume`` is a file of another analysis.
    """
    view, data = _measured(view, data)
    lesions = [_of_step(i, step) for i, step in enumerate(view.steps)]
    networks = [None if step.not_deletable else delete(i)(view) for i, step in enumerate(view.steps)]
    return _table("single", view, lesions, networks, data, how)


def layer(
    view: ResidualDynamics,
    data: Data,
    **how: Unpack[How],
) -> LesionTable:
    """Delete one layer without a shortcut at a time (VGG, a plain net; Veit et al. 2016, figure 3): see :func:`single`.

    A layer that changes the shape cannot be deleted.

    Raises:
        InvalidInput: for a network without such layers.
    """
    places = [i for i, step in enumerate(view.steps) if step.is_counted]
    if not places:
        raise InvalidInput("this network has no layer without a shortcut: its steps are deleted by lesion.single")
    view, data = _measured(view, data)
    lesions = [_of_step(i, view.steps[i]) for i in places]
    networks = [None if view.steps[i].not_deletable else delete(i)(view) for i in places]
    return _table("layer", view, lesions, networks, data, how)


def stage(
    view: ResidualDynamics,
    data: Data,
    **how: Unpack[How],
) -> LesionTable:
    """Delete all steps of one stage at a time, but for those that cannot be deleted: see :func:`single`."""
    view, data = _measured(view, data)
    lesions, networks = [], []
    for index in sorted({step.stage for step in view.steps}):
        able = tuple(i for i in select(view, stage=index) if view.steps[i].not_deletable is None)
        lesions.append(Lesion(f"stage {index}", able, stage=index, number=len(able)))
        networks.append(delete(*able)(view) if able else None)
    return _table("stage", view, lesions, networks, data, how)


def multiple(
    view: ResidualDynamics,
    data: Data,
    *,
    most: int | None = None,
    numbers: Sequence[int] | None = None,
    draws: int = 10,
    stage: Stage | None = None,
    seed: int = 0,
    **how: Unpack[How],
) -> LesionTable:
    """Delete k steps drawn at random, n times for each k = 1 … K (Veit et al. 2016, figure 5a): see :func:`single`.

    Args:
        most: K; 10, or as many as can be deleted, if None.
        numbers: the k's, in place of 1 … K.
        draws: n, the sets drawn uniformly and independently for each k.
        stage: draw from these stages alone.
        seed: of the draws.

    Raises:
        InvalidInput: for more steps than can be deleted, or fewer than one draw.
    """
    view, data = _measured(view, data)
    among = [i for i in select(view, stage=stage) if view.steps[i].not_deletable is None]
    numbers = _numbers(numbers, most, len(among), "steps that can be deleted")
    _require_draws(draws)
    drawn = random.Random(seed)
    lesions, networks = [], []
    for k in numbers:
        for draw in range(draws):
            chosen = tuple(sorted(drawn.sample(among, k)))
            lesions.append(Lesion(f"{k} deleted", chosen, number=k, draw=draw))
            networks.append(delete(*chosen)(view))
    return _table("multiple", view, lesions, networks, data, how)


def permute(
    view: ResidualDynamics,
    data: Data,
    *,
    most: int | None = None,
    numbers: Sequence[int] | None = None,
    draws: int = 10,
    stage: Stage | None = None,
    seed: int = 0,
    **how: Unpack[How],
) -> LesionTable:
    """Swap k random pairs of steps of one shape, one after the other, n times for each k (Veit et al. 2016, figure 5b).

    The order is measured by Kendall's τ between the places of all steps and those of the training: 1 for the order of
    the training, −1 for its reverse. See :func:`single`.

    Args:
        most: K; 10 if None.
        numbers: the k's, in place of 1 … K.
        draws: n, for each k.
        stage: swap within these stages alone.
        seed: of the draws.

    Raises:
        InvalidInput: when no two steps have one shape, or for fewer than one draw.
    """
    view, data = _measured(view, data)
    pairs = exchangeable(view, select(view, stage=stage))
    if not pairs:
        raise InvalidInput(
            "no two steps of this network take and give states of one shape: there is nothing to permute"
        )
    numbers = _numbers(numbers, most, None, "swaps")
    _require_draws(draws)
    drawn = random.Random(seed)
    lesions, networks = [], []
    for k in numbers:
        for draw in range(draws):
            order = list(range(len(view.steps)))
            for i, j in (drawn.choice(pairs) for _ in range(k)):
                order[i], order[j] = order[j], order[i]
            moved = tuple(place for place, step in enumerate(order) if place != step)
            tau = float(kendalltau(range(len(order)), order).statistic)
            lesions.append(Lesion(f"{k} swapped", moved, number=k, draw=draw, tau=tau))
            networks.append(view.with_steps([view.steps[i] for i in order]))
    return _table("permute", view, lesions, networks, data, how)


def interventions(
    view: ResidualDynamics,
    data: Data,
    changes: Mapping[str, Intervention] | Sequence[Intervention],
    **how: Unpack[How],
) -> LesionTable:
    """Make any changes, one at a time (see ``paths.interventions``): see :func:`single`.

    Args:
        changes: by name, or called by their own.
    """
    named = changes if isinstance(changes, Mapping) else {change.name: change for change in changes}
    view, data = _measured(view, data)
    networks = [change(view) for change in named.values()]
    lesions = [
        Lesion(name, tuple(i for i, step in enumerate(view.steps) if network.steps[i] is not step))
        for name, network in zip(named, networks, strict=True)
    ]
    return _table("interventions", view, lesions, networks, data, how)


def exchangeable(view: ResidualDynamics, places: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of ``places`` whose steps are of one kind and map states of one shape to the same shape."""
    groups: dict[object, list[int]] = {}
    for i in places:
        step = view.steps[i]
        if step.kind != "transition" and step.shapes is not None:
            groups.setdefault((step.kind, step.shapes), []).append(i)
    return [(i, j) for group in groups.values() for i in group for j in group if i < j]


def _measured(view: ResidualDynamics, data: Data) -> tuple[ResidualDynamics, Data]:
    """The view with the shapes that its steps meet (the first batch tells, where they are not known), and the data.

    Raises:
        InvalidInput: when there are none.
    """
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise InvalidInput("lesions need data to measure the error on, and there is none")
    whole = data if iter(data) is not batches else chain([first], batches)
    known = all(step.shapes is not None for step in view.steps)
    return view if known else view.measured(first[0]), whole


def _of_step(place: int, step: Step) -> Lesion:
    return Lesion(step.label, (place,), step.kind, step.stage, step.t)


def _numbers(given: Sequence[int] | None, most: int | None, there: int | None, what: str) -> list[int]:
    if given is not None and most is not None:
        raise InvalidInput(f"numbers {list(given)} and most={most} both say how many: give one of them")
    default = 10 if there is None else min(10, there)
    numbers = list(given) if given is not None else list(range(1, (default if most is None else most) + 1))
    if not numbers or min(numbers) < 0 or (there is not None and max(numbers) > there):
        bound = "" if there is None else f" and at most {there}, the number of {what}"
        raise InvalidInput(f"{what}: {numbers or most} is asked for, at least 1{bound} is expected")
    return numbers


def _require_draws(draws: int) -> None:
    if draws < 1:
        raise InvalidInput(f"draws is {draws}: at least 1 is needed")


def _table(
    analysis: str,
    view: ResidualDynamics,
    lesions: Sequence[Lesion],
    networks: Sequence[ResidualDynamics | None],
    data: Data,
    how: How,
) -> LesionTable:
    made = [i for i, network in enumerate(networks) if network is not None]
    question = [analysis, how.get("by_class", False), [(lesion.label, lesion.steps) for lesion in lesions]]
    resume = how.get("resume")
    kept = Progress(None if resume is None else Path(resume), fingerprint(view.model, question) if resume else "")
    *found, baseline = _scores(view, [networks[i].steps for i in made], data, how, kept, f"lesions ({analysis})")
    kept.finish()
    of = dict(zip(made, found, strict=True))
    return LesionTable(analysis, baseline, tuple(replace(one, score=of.get(i)) for i, one in enumerate(lesions)))


def _scores(
    view: ResidualDynamics, networks: Sequence[streams.Steps], data: Data, how: How, kept: Progress, said: str
) -> list[Score]:
    """The score of each of ``networks``, and last that of ``view`` itself."""
    width = how.get("streams")
    if width is not None and width < 1:
        raise InvalidInput(f"streams is {width}: at least 1 is needed")
    tallies = Tallies(len(networks) + 1, how.get("by_class", False))
    batches = len(data) if isinstance(data, Sized) else None
    total = None if batches is None else batches * (len(networks) + 1)
    hidden = None if how.get("progress") else True
    with view.evaluation(), tqdm(total=total, desc=said, unit="net", leave=False, disable=hidden) as bar:
        for x, labels in kept.resume(data, tallies):
            answers = streams.answers(view, networks, x, width or streams.default_streams(x))
            for i, (network, logits) in enumerate(answers):
                if i == 0:
                    tallies.begin(labels, logits.shape[1])
                tallies.add(len(networks) if network is None else network, logits, labels)
                bar.update()
    return tallies.scores()
