"""Lesions: what a trained network does without some of its steps, which it was never trained to do without.

Veit, Wilber & Belongie 2016, arXiv 1605.06431, section 4: a residual net loses little when one block is deleted, since
half of its 2^L paths remain (:func:`single`); its error grows smoothly with the number of blocks deleted
(:func:`multiple`) or put out of order (:func:`permute`). A plain net has one path, and falls to chance.

Each analysis goes through the data once. For many lesions of a large network it takes ``resume=PATH``: the sums so far
are kept there, and an analysis that was interrupted goes on from them to the same numbers.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

from scipy.stats import kendalltau

from resode.dynamics import ResidualDynamics
from resode.errors import InvalidInput, NoSuchSteps
from resode.paths.interventions import Intervention, delete
from resode.paths.places import Stage, select
from resode.paths.study import Data, How, Study
from resode.paths.table import Lesion, LesionTable

__all__ = [
    "Data",
    "How",
    "Lesion",
    "LesionTable",
    "exchangeable",
    "interventions",
    "layer",
    "multiple",
    "permute",
    "single",
    "stage",
]


def single(view: ResidualDynamics, data: Data, **how: Unpack[How]) -> LesionTable:
    """Delete one step at a time, and measure error and loss on ``data`` (Veit et al. 2016, figure 3).

    Args:
        view: the network.
        data: pairs (x, labels).
        how: see :class:`~resode.paths.study.How`.

    A transition, or a plain layer that changes the shape of the state, cannot be deleted: its lesion has no score.

    Raises:
        InvalidInput: when ``data`` is empty, or ``resume`` is a file of another analysis.
    """
    study = Study(view, data, how)
    return _each("single", study, range(len(view.steps)))


def layer(view: ResidualDynamics, data: Data, **how: Unpack[How]) -> LesionTable:
    """Delete one layer without a shortcut at a time (VGG, a plain net; Veit et al. 2016, figure 3): see :func:`single`.

    A layer that changes the shape cannot be deleted.

    Raises:
        InvalidInput: for a network without such layers.
    """
    study = Study(view, data, how)
    places = [i for i, step in enumerate(view.steps) if step.is_counted]
    if not places:
        raise NoSuchSteps("this network has no layer without a shortcut: its steps are deleted by lesion.single")
    return _each("layer", study, places)


def stage(view: ResidualDynamics, data: Data, **how: Unpack[How]) -> LesionTable:
    """Delete all steps of one stage at a time, but for those that cannot be deleted: see :func:`single`."""
    study = Study(view, data, how)
    view, lesions, networks = study.view, [], []
    for index in sorted({step.stage for step in view.steps}):
        able = _deletable(view, index)
        lesions.append(Lesion(f"stage {index}", able, stage=index, number=len(able)))
        networks.append(delete(*able)(view) if able else None)
    return study.table("stage", lesions, networks)


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
    study = Study(view, data, how)
    view, lesions, networks = study.view, [], []
    among = _deletable(view, stage)
    for k, draw, drawn in _draws(_numbers(numbers, most, len(among)), draws, seed):
        chosen = tuple(sorted(drawn.sample(among, k)))
        lesions.append(Lesion(f"{k} deleted", chosen, number=k, draw=draw))
        networks.append(delete(*chosen)(view) if chosen else view)
    return study.table("multiple", lesions, networks)


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
        NoSuchSteps: when no two steps have one shape.
        InvalidInput: for fewer than one draw.
    """
    study = Study(view, data, how)
    view, lesions, networks = study.view, [], []
    pairs = exchangeable(view, select(view, stage=stage))
    if not pairs:
        raise NoSuchSteps("no two of these steps take and give states of one shape: there is nothing to permute")
    for k, draw, drawn in _draws(_numbers(numbers, most), draws, seed):
        order = list(range(len(view.steps)))
        for i, j in (drawn.choice(pairs) for _ in range(k)):
            order[i], order[j] = order[j], order[i]
        moved = {place: step for place, step in enumerate(order) if place != step}
        tau = round(float(kendalltau(range(len(order)), order).statistic), 12)  # 1 and −1 exactly
        found = Lesion(f"{k} swapped", tuple(moved), number=k, draw=draw, tau=tau, order=tuple(moved.values()))
        lesions.append(found)
        networks.append(view.with_steps([view.steps[i] for i in order]))
    return study.table("permute", lesions, networks)


def interventions(
    view: ResidualDynamics,
    data: Data,
    changes: Intervention | Sequence[Intervention] | Mapping[str, Intervention],
    **how: Unpack[How],
) -> LesionTable:
    """Make any changes, one at a time (see ``paths.interventions``): see :func:`single`.

    Args:
        changes: by name, or called by their own.

    Raises:
        InvalidInput: for a change of anything but steps.
    """
    study = Study(view, data, how)
    view, lesions, networks = study.view, [], []
    if isinstance(changes, Intervention):
        changes = [changes]
    named = changes.items() if isinstance(changes, Mapping) else [(change.name, change) for change in changes]
    for name, change in named:
        network = change(view)
        if (network.stem, network.head, len(network.steps)) != (view.stem, view.head, len(view.steps)):
            raise InvalidInput(f"{name!r} changes the stem, the head or the number of steps: change the steps alone")
        places = tuple(i for i, step in enumerate(view.steps) if network.steps[i] is not step)
        lesions.append(Lesion(name, places))
        networks.append(network)
    return study.table("interventions", lesions, networks)


def exchangeable(view: ResidualDynamics, places: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of ``places`` whose steps are of one kind and map states of one shape to the same shape."""
    groups: dict[object, list[int]] = {}
    for i in places:
        step = view.steps[i]
        if step.kind != "transition" and step.shapes is not None:
            groups.setdefault((step.kind, step.shapes), []).append(i)
    return [(i, j) for group in groups.values() for i in group for j in group if i < j]


def _each(analysis: str, study: Study, places: Sequence[int]) -> LesionTable:
    """Without each of the steps at these places in turn."""
    steps = {i: study.view.steps[i] for i in places}
    lesions = [Lesion(step.label, (i,), step.kind, step.stage, step.t) for i, step in steps.items()]
    networks = [None if step.not_deletable else delete(i)(study.view) for i, step in steps.items()]
    return study.table(analysis, lesions, networks)


def _deletable(view: ResidualDynamics, stage: Stage | None) -> tuple[int, ...]:
    return tuple(i for i in select(view, stage=stage) if view.steps[i].not_deletable is None)


def _draws(numbers: Sequence[int], draws: int, seed: int) -> Iterator[tuple[int, int, random.Random]]:
    """Each number and draw, with what to draw by: the same whatever other numbers and draws are asked for."""
    if draws < 1:
        raise InvalidInput(f"draws is {draws}: at least 1 is needed")
    for k in numbers:
        for draw in range(draws):
            yield k, draw, random.Random(f"{seed} {k} {draw}")


def _numbers(given: Sequence[int] | None, most: int | None, there: int | None = None) -> list[int]:
    """The numbers asked for, of deletions among the steps ``there``, or of swaps."""
    if given is not None and most is not None:
        raise InvalidInput(f"numbers {list(given)} and most={most} both say how many: give one of them")
    if there == 0:
        raise NoSuchSteps("none of these steps can be deleted")
    if most is None:
        most = 10 if there is None else min(10, there)
    numbers = list(range(1, most + 1)) if given is None else list(given)
    if not numbers or min(numbers) < 0 or (there is not None and max(numbers) > there):
        said = f"most is {most}" if given is None else f"numbers are {numbers}"
        bound = "" if there is None else f" and at most {there}, of the steps that can be deleted,"
        raise InvalidInput(f"{said}: at least {int(given is None)}{bound} is expected")
    return numbers
