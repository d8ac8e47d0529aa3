"""The vocabulary of lesions: delete, permute, swap, scale, noise, only.

An intervention turns a view of a network into the view of a changed one, and leaves the network alone::

    lesioned = (delete(3) >> scale(0.5, stage=1))(dynamics(net))

or is in force for a while, whoever calls the model::

    with applied(net, delete(interval=(0.25, 0.5))):
        logits = net(x)

Every word acts on ``steps`` (indices or labels), or on a ``stage`` (one or several), on the ``interval`` of t from one
point of the grid to another, or on the part of an interval within a stage. By stage or interval it acts on those steps
there on which it can act: a transition is never among them. Places are counted in the network as it was read, and none
of the words changes their number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resode.dynamics import Grid, Reader, ResidualDynamics, Step, dynamics
from resode.errors import InvalidInput
from resode.layers.context import Field

View = ResidualDynamics
Stage = int | Sequence[int]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Intervention:
    """A change of a network, called with a view of it.

    Args:
        name: what it does, for tables.
        change: from a view to the changed one.
    """

    name: str
    change: Callable[[View], View]

    def __call__(self, view: View) -> View:
        """The view of the changed network."""
        return self.change(view)

    def __rshift__(self, other: "Intervention") -> "Intervention":
        """This, and then the ``other``."""
        return Intervention(f"{self.name}, {other.name}", lambda view: other(self(view)))


def delete(*steps: int | str, stage: Stage | None = None, interval: Interval | None = None) -> Intervention:
    """Without the branches of these steps: h ↦ post(shortcut(h)); a plain step becomes the identity.

    Raises (when applied):
        InvalidInput: for a transition, or a plain step that changes the shape.
    """
    return _on_each("delete", Step.deleted, steps, stage, interval)


def scale(
    factor: float, *steps: int | str, stage: Stage | None = None, interval: Interval | None = None
) -> Intervention:
    """The branches of these steps times ``factor``; of a plain step, which has no shortcut, all of its output."""
    return _on_each(f"scale by {factor:g}", lambda step: _scaled(step, factor), steps, stage, interval)


def noise(
    strength: float, *steps: int | str, stage: Stage | None = None, interval: Interval | None = None, seed: int = 0
) -> Intervention:
    """White noise on the branches of these steps: f + ``strength``·rms(f)·ε, with ε ~ N(0, 1) for each element.

    The root mean square is that of each sample. ε depends on ``seed``, the step and the shape of f alone, so that the
    changed network is still a function of its input; the global random state is left as it is.
    """
    if strength < 0:
        raise InvalidInput(f"noise of strength {strength:g}: at least 0 is expected")

    def change(view: View) -> View:
        chosen = _chosen(view, "noise", steps, stage, interval)
        return _replaced(view, {i: _noisy(view.steps[i], strength, seed, i) for i in chosen})

    return Intervention(_named(f"noise of {strength:g}", steps, stage, interval), change)


def only(*steps: int | str, stage: Stage | None = None, interval: Interval | None = None) -> Intervention:
    """Without every step but these (and those that cannot be deleted); ``only()`` keeps none that can."""

    def change(view: View) -> View:
        named = steps or stage is not None or interval is not None
        kept = set(_chosen(view, "only", steps, stage, interval) if named else ())
        rest = [i for i, step in enumerate(view.steps) if i not in kept and step.not_deletable is None]
        return _replaced(view, {i: view.steps[i].deleted() for i in rest})

    return Intervention(_named("only", steps, stage, interval), change)


def permute(
    order: Sequence[int], *steps: int | str, stage: Stage | None = None, interval: Interval | None = None
) -> Intervention:
    """These steps in another order: the i-th of their places gets the ``order[i]``-th of them.

    A step moves with its time and everything else it has.

    Raises (when applied):
        InvalidInput: when ``order`` is no permutation of their indices 0, 1, …, or a step is moved to where states are
            known to have another shape.
    """
    order = tuple(order)

    def change(view: View) -> View:
        places = _chosen(view, "permute", steps, stage, interval)
        if sorted(order) != list(range(len(places))):
            raise InvalidInput(
                f"permute by {order}: a permutation of 0 … {len(places) - 1} is expected, one for each of the steps "
                f"{', '.join(map(str, places))}"
            )
        moved = {place: view.steps[places[source]] for place, source in zip(places, order, strict=True)}
        for place, step in moved.items():
            _require_fit(step, view.steps[place])
        return _replaced(view, moved)

    return Intervention(_named(f"permute by {order}", steps, stage, interval), change)


def swap(one: int | str, other: int | str) -> Intervention:
    """Two steps in each other's place."""
    return Intervention(f"swap {one} and {other}", permute((1, 0), one, other).change)


@contextmanager
def applied(
    model: nn.Module, *interventions: Intervention, grid: Grid | None = None, read: Reader | None = None
) -> Iterator[View]:
    """Let ``model`` compute what its changed view computes, for a while; nothing of it stays.

    Args:
        interventions: applied one after the other.
        grid, read: as in :func:`resode.dynamics`.
    """
    view = dynamics(model, grid=grid, read=read)
    for intervention in interventions:
        view = intervention(view)
    held = model.__dict__.get("forward")
    model.forward = view.__call__
    try:
        yield view
    finally:
        if held is None:
            del model.forward
        else:
            model.forward = held


def select(
    view: View, steps: Sequence[int | str] = (), stage: Stage | None = None, interval: Interval | None = None
) -> tuple[int, ...]:
    """The places of the ``steps`` named, or of all those of a ``stage``, of an ``interval`` of t, or of both.

    Where an ODE block was read as steps, those of its solver alone have an interval. Elsewhere a block has one time,
    and is in the interval [a, b) if that is.

    Raises:
        InvalidInput: for a step or a stage that is not there, an interval whose ends are no points of the grid, or
            steps together with a stage or an interval.
    """
    if steps and (stage is not None or interval is not None):
        raise InvalidInput("name steps, or a stage and an interval of t, but not both: intervene twice, with >>")
    if steps:
        return tuple(_place(view, step) for step in steps)
    places = range(len(view.steps))
    if stage is not None:
        wanted = (stage,) if isinstance(stage, int) else tuple(stage)
        there = sorted({step.stage for step in view.steps})
        if missing := [s for s in wanted if s not in there]:
            raise InvalidInput(f"there is no stage {missing[0]}: this network has {', '.join(map(str, there))}")
        places = [i for i in places if view.steps[i].stage in wanted]
    if interval is not None:
        places = _within(view, places, interval)
    return tuple(places)


def _place(view: View, step: int | str) -> int:
    if isinstance(step, str):
        found = [i for i, other in enumerate(view.steps) if other.label == step]
        if len(found) != 1:
            labels = ", ".join(other.label for other in view.steps[:6])
            raise InvalidInput(f"{len(found)} steps are labelled {step!r}: name one, or its index ({labels}, …)")
        return found[0]
    if not 0 <= step < len(view.steps):
        raise InvalidInput(f"there is no step {step}: this network has the steps 0 … {len(view.steps) - 1}")
    return step


def _within(view: View, places: Sequence[int], interval: Interval) -> list[int]:
    a, b = interval
    if not a < b:
        raise InvalidInput(f"the interval of t from {a:g} to {b:g} is empty: its end must be above its start")
    solver = [i for i in places if view.steps[i].end is not None]
    if not solver:
        return [i for i in places if a <= view.steps[i].t < b]
    points = sorted({t for i in solver for t in (view.steps[i].t, view.steps[i].end)})
    close = 1e-9 * (points[-1] - points[0])
    for t in interval:
        if min(abs(t - point) for point in points) > close:
            said = ", ".join(f"{point:.4g}" for point in points[:12]) + (", …" if len(points) > 12 else "")
            raise InvalidInput(
                f"t = {t:g} is no point of the grid ({said}): choose points of it, or read the network on a finer "
                "grid, dynamics(net, grid=32)"
            )
    return [i for i in solver if view.steps[i].t > a - close and view.steps[i].end < b + close]


def _chosen(
    view: View, word: str, steps: Sequence[int | str], stage: Stage | None, interval: Interval | None
) -> tuple[int, ...]:
    """The places on which to act, each once."""
    if not steps and stage is None and interval is None:
        raise InvalidInput(f"{word} what? Name steps, a stage, or an interval of t")
    found = select(view, steps, stage, interval)
    if steps:
        if len(set(found)) < len(found):
            raise InvalidInput(f"{word} {', '.join(map(str, steps))}: each step can be named once")
        if refused := next((view.steps[i] for i in found if view.steps[i].kind == "transition"), None):
            raise InvalidInput(f"{word}: step {refused.label!r} is a transition between resolutions; choose others")
        return found
    able = tuple(i for i in found if view.steps[i].not_deletable is None)
    if not able:
        raise InvalidInput(f"{_named(word, steps, stage, interval)}: no step is there on which that can act")
    return able


def _on_each(
    word: str,
    change: Callable[[Step], Step],
    steps: Sequence[int | str],
    stage: Stage | None,
    interval: Interval | None,
) -> Intervention:
    return Intervention(
        _named(word, steps, stage, interval),
        lambda view: _replaced(view, {i: change(view.steps[i]) for i in _chosen(view, word, steps, stage, interval)}),
    )


def _replaced(view: View, changed: dict[int, Step]) -> View:
    return view.with_steps([changed.get(i, step) for i, step in enumerate(view.steps)])


def _named(word: str, steps: Sequence[int | str], stage: Stage | None, interval: Interval | None) -> str:
    said = [word, *(", ".join(map(str, steps)) for _ in steps[:1])]
    said += [] if stage is None else [f"stage {stage}"]
    said += [] if interval is None else [f"t from {interval[0]:g} to {interval[1]:g}"]
    return " ".join(said)


def _scaled(step: Step, factor: float) -> Step:
    if step.branch is None:
        return step
    if step.kind == "residual":
        return replace(step, scale=step.scale * factor)
    return replace(step, branch=_Then(step.branch, lambda out: factor * out))


def _noisy(step: Step, strength: float, seed: int, place: int) -> Step:
    if step.branch is None:
        return step

    def add_noise(out: Tensor) -> Tensor:
        generator = torch.Generator(out.device).manual_seed(1_000_003 * seed + place)
        drawn = torch.empty_like(out).normal_(generator=generator)
        rms = out.square().mean(tuple(range(1, out.ndim)), keepdim=True).sqrt()
        return out + strength * rms * drawn

    return replace(step, branch=_Then(step.branch, add_noise))


@dataclass(frozen=True)
class _Then:
    """A branch with something done to what it gives."""

    branch: Field
    change: Callable[[Tensor], Tensor]

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.change(self.branch(t, h))


def _require_fit(step: Step, place: Step) -> None:
    if step.shapes is not None and place.shapes is not None and step.shapes != place.shapes:
        raise InvalidInput(
            f"step {step.label!r} turns a state of shape {step.shapes[0]} into {step.shapes[1]}, and stands for "
            f"{place.label!r}, which turns {place.shapes[0]} into {place.shapes[1]}: exchange steps of one shape"
        )
