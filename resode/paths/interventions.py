"""The vocabulary of lesions: delete, permute, swap, scale, noise, only.

An intervention turns a view of a network into the view of a changed one, and leaves the network alone::

    lesioned = (delete(3) >> scale(0.5, stage=1))(dynamics(net))

or is in force for a while, whoever calls the model::

    with applied(net, delete(interval=(0.25, 0.5))):
        logits = net(x)

Every word acts on ``steps`` (indices or labels), or on a ``stage`` (one or several), on the ``interval`` of t from one
point of the grid to another, or on the part of an interval within a stage: see :func:`resode.paths.places.select`. By
stage or interval it acts on those steps there on which it can act: on no transition, and ``delete`` on no plain step
that changes the shape. None of the words changes the number of steps: an index means what it meant when the network
was read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resode.dynamics import Grid, Reader, ResidualDynamics, Step, dynamics
from resode.errors import InvalidInput
from resode.layers.context import Field
from resode.paths.places import Interval, Stage, View, chosen, named, require_view


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
        require_view(view, self.name)
        return self.change(view)

    def __rshift__(self, other: "Intervention") -> "Intervention":
        """This, and then the ``other``."""
        return Intervention(f"{self.name} >> {other.name}", lambda view: other(self(view)))


def delete(*steps: int | str, stage: Stage | None = None, interval: Interval | None = None) -> Intervention:
    """Without the branches of these steps: h ↦ post(shortcut(h)); a plain step becomes the identity.

    Raises (when applied):
        InvalidInput: for a transition, or a plain step that changes the shape.
    """
    return _on_each("delete", lambda step, place: step.deleted(), steps, stage, interval)


def scale(
    factor: float, *steps: int | str, stage: Stage | None = None, interval: Interval | None = None
) -> Intervention:
    """The branches of these steps times ``factor``; of a plain step, which has no shortcut, all of its output."""
    if not math.isfinite(factor):
        raise InvalidInput(f"scale by {factor}: a finite number is expected")
    return _on_each("scale", lambda step, place: _scaled(step, factor), steps, stage, interval, f"by {factor!r}")


def noise(
    strength: float, *steps: int | str, stage: Stage | None = None, interval: Interval | None = None, seed: int = 0
) -> Intervention:
    """White noise on the branches of these steps: f + ``strength``·rms(f)·ε, with ε ~ N(0, 1) for each element.

    The root mean square is that of each sample. ε follows from ``seed``, the place and the shape of one sample, and is
    the same for every sample: the changed network is still a function of its input, however that is cut into batches.
    What noise does on average is found over several seeds. The global random state is left as it is.
    """
    if not 0 <= strength < math.inf:
        raise InvalidInput(f"noise of strength {strength}: a number of at least 0 is expected")
    said = f"of {strength!r}, seed {seed}"
    return _on_each("noise", lambda step, place: _noisy(step, strength, seed, place), steps, stage, interval, said)


def only(*steps: int | str, stage: Stage | None = None, interval: Interval | None = None) -> Intervention:
    """Without every step but these (and those that cannot be deleted); ``only()`` keeps none that can."""

    def change(view: View) -> View:
        named = steps or stage is not None or interval is not None
        kept = set(chosen(view, "only", steps, stage, interval) if named else ())
        rest = [i for i, step in enumerate(view.steps) if i not in kept and step.not_deletable is None]
        return _replaced(view, {i: view.steps[i].deleted() for i in rest})

    return Intervention(named("only", steps, stage, interval), change)


def permute(
    order: Sequence[int], *steps: int | str, stage: Stage | None = None, interval: Interval | None = None
) -> Intervention:
    """These steps in another order: the i-th of their places gets the ``order[i]``-th of them.

    A step moves with its time and everything else it has. By stage or interval, ``order`` is of all the steps there but
    transitions.

    Raises (when applied):
        InvalidInput: when ``order`` is no permutation of their indices 0, 1, …, or a step is moved to where states are
            known to have another shape.
    """
    order = tuple(order)

    def change(view: View) -> View:
        places = chosen(view, "permute", steps, stage, interval)
        if sorted(order) != list(range(len(places))):
            raise InvalidInput(
                f"permute by {order}: a permutation of 0 … {len(places) - 1} is expected, one for each of the steps "
                f"{', '.join(map(str, places))}"
            )
        moved = {place: view.steps[places[source]] for place, source in zip(places, order, strict=True)}
        for place, step in moved.items():
            _require_fit(step, view.steps[place])
        return _replaced(view, moved)

    return Intervention(named("permute", steps, stage, interval, f"by {order}"), change)


def swap(one: int | str, other: int | str) -> Intervention:
    """Two steps in each other's place."""
    return Intervention(f"swap {one} and {other}", permute((1, 0), one, other).change)


@contextmanager
def applied(
    model: nn.Module,
    *interventions: Intervention,
    example: Tensor | None = None,
    grid: Grid | None = None,
    read: Reader | None = None,
) -> Iterator[View]:
    """Let ``model`` compute what its changed view computes, for a while; nothing of it stays.

    Args:
        interventions: applied one after the other; within another ``applied``, after those in force.
        example, grid, read: as in :func:`resode.dynamics`.

    Raises:
        InvalidInput: as :func:`resode.dynamics` and the interventions; for ``example``, ``grid`` or ``read`` within
            another ``applied``, where the model has been read.
    """
    held = model.__dict__.get("forward")
    view = getattr(held, "__self__", None)
    if not isinstance(view, ResidualDynamics):
        view = dynamics(model, example, grid, read)
    elif any(given is not None for given in (example, grid, read)):
        raise InvalidInput("the model is read where the outermost applied begins: give it example, grid or read there")
    for intervention in interventions:
        view = intervention(view)
    model.forward = view.__call__
    try:
        yield view
    finally:
        if held is None:
            del model.forward
        else:
            model.forward = held


def _on_each(
    word: str,
    change: Callable[[Step, int], Step],
    steps: Sequence[int | str],
    stage: Stage | None,
    interval: Interval | None,
    how: str = "",
) -> Intervention:
    def changed(view: View) -> View:
        places = chosen(view, word, steps, stage, interval)
        return _replaced(view, {i: change(view.steps[i], i) for i in places})

    return Intervention(named(word, steps, stage, interval, how), changed)


def _replaced(view: View, changed: dict[int, Step]) -> View:
    return view.with_steps([changed.get(i, step) for i, step in enumerate(view.steps)])


def _scaled(step: Step, factor: float) -> Step:
    if step.branch is None:
        return step
    if step.kind == "residual" and not isinstance(step.scale, Tensor):
        return replace(step, scale=step.scale * factor)
    # A learned scale stays the parameter that it is: its product would be of its value now.
    return replace(step, branch=_Then(step.branch, lambda out: factor * out, f"scale by {factor!r}"))


def _noisy(step: Step, strength: float, seed: int, place: int) -> Step:
    if step.branch is None:
        return step

    def add_noise(out: Tensor) -> Tensor:
        generator = torch.Generator(out.device).manual_seed(1_000_003 * seed + place)
        drawn = torch.randn(out.shape[1:], generator=generator, dtype=out.dtype, device=out.device)
        samples = out.flatten(1)
        # By a norm: its gradient is 0 where f is, and in half precision its sum of squares does not overflow.
        rms = torch.linalg.vector_norm(samples, dim=1) / samples.shape[1] ** 0.5
        return out + strength * rms.view(-1, *[1] * drawn.ndim) * drawn

    return replace(step, branch=_Then(step.branch, add_noise, f"noise of {strength!r}, seed {seed}, at {place}"))


@dataclass(frozen=True)
class _Then:
    """A branch with something done to what it gives, and the words for it."""

    branch: Field
    change: Callable[[Tensor], Tensor]
    said: str

    def __call__(self, t: float | Tensor, h: Tensor) -> Tensor:
        return self.change(self.branch(t, h))


def changes_of(step: Step) -> list[str]:
    """What was done to the output of the step's branch, the last first."""
    said, branch = [], step.branch
    while isinstance(branch, _Then):
        said.append(branch.said)
        branch = branch.branch
    return said


def _require_fit(step: Step, place: Step) -> None:
    if step.shapes is not None and place.shapes is not None and step.shapes != place.shapes:
        raise InvalidInput(
            f"step {step.label!r} turns a state of shape {step.shapes[0]} into {step.shapes[1]}, and stands for "
            f"{place.label!r}, which turns {place.shapes[0]} into {place.shapes[1]}: exchange steps of one shape"
        )
