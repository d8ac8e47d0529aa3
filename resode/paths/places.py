"""The places in a network at which to intervene: steps by index or label, stages, intervals of t."""

from collections.abc import Sequence
from numbers import Integral

from resode.dynamics import ResidualDynamics, Step
from resode.errors import InvalidInput

View = ResidualDynamics
Stage = int | Sequence[int]
Interval = tuple[float, float]


def select(
    view: View, steps: Sequence[int | str] = (), stage: Stage | None = None, interval: Interval | None = None
) -> tuple[int, ...]:
    """The places of the ``steps`` named, or of all those of a ``stage``, of an ``interval`` of t, or of both.

    Where an ODE block was read as steps, those of its solver alone are in intervals. Elsewhere a block has one time,
    and is in the interval [a, b) if that is; one that changes the shape is no step of a flow, and is in none.

    Raises:
        InvalidInput: for a step or a stage that is not there, an interval whose ends are no points of the grid or of a
            network whose steps have no times, or steps together with a stage or an interval.
    """
    if steps and (stage is not None or interval is not None):
        raise InvalidInput("name steps, or a stage and an interval of t, but not both: intervene twice, with >>")
    if steps:
        return tuple(_place(view, step) for step in steps)
    places = range(len(view.steps))
    if stage is not None:
        wanted = (stage,) if isinstance(stage, Integral) else tuple(stage)
        there = sorted({step.stage for step in view.steps})
        if missing := [s for s in wanted if s not in there]:
            raise InvalidInput(f"there is no stage {missing[0]}: this network has {', '.join(map(str, there))}")
        places = [i for i in places if view.steps[i].stage in wanted]
    if interval is not None:
        places = _within(view, places, interval)
    return tuple(places)


def chosen(
    view: View, word: str, steps: Sequence[int | str], stage: Stage | None, interval: Interval | None
) -> tuple[int, ...]:
    """The places on which ``word`` acts, each once.

    Raises:
        InvalidInput: as :func:`select`; for none, a step named twice, or a transition.
    """
    if not steps and stage is None and interval is None:
        raise InvalidInput(f"{word} what? Name steps, a stage, or an interval of t")
    found = select(view, steps, stage, interval)
    if steps:
        if len(set(found)) < len(found):
            raise InvalidInput(f"{word} {', '.join(map(str, steps))}: each step can be named once")
        if refused := next((view.steps[i] for i in found if view.steps[i].kind == "transition"), None):
            raise InvalidInput(f"{word}: step {refused.label!r} is a transition between resolutions; choose others")
        return found
    able = tuple(i for i in found if _can(word, view.steps[i]))
    if not able:
        raise InvalidInput(f"{named(word, steps, stage, interval)}: no step is there on which that can act")
    return able


def named(word: str, steps: Sequence[int | str], stage: Stage | None, interval: Interval | None, how: str = "") -> str:
    """An intervention's name."""
    said = [word, *(", ".join(map(str, steps)) for _ in steps[:1])]
    said += [] if stage is None else [f"stage {stage}"]
    said += [] if interval is None else [f"t from {interval[0]:g} to {interval[1]:g}"]
    return " ".join([*said, how]).rstrip()


def require_view(view: View, what: str) -> None:
    """Refuse what is no view of a network.

    Raises:
        InvalidInput: with what to give.
    """
    if not isinstance(view, ResidualDynamics):
        raise InvalidInput(
            f"{what}: a view of a network is expected, and this is a {type(view).__name__}; give resode.dynamics(net)"
        )


def _can(word: str, step: Step) -> bool:
    return step.not_deletable is None if word == "delete" else step.kind != "transition"


def _place(view: View, step: int | str) -> int:
    if isinstance(step, str):
        found = [i for i, other in enumerate(view.steps) if other.label == step]
        if len(found) != 1:
            labels = ", ".join(other.label for other in view.steps[:6])
            raise InvalidInput(f"{len(found)} steps are labelled {step!r}: name one, or its index ({labels}, …)")
        return found[0]
    if not isinstance(step, Integral):
        raise InvalidInput(f"steps are named one by one, by index or label, such as delete(3, 4), and not by {step!r}")
    if not 0 <= step < len(view.steps):
        raise InvalidInput(f"there is no step {step}: this network has the steps 0 … {len(view.steps) - 1}")
    return int(step)


def _within(view: View, places: Sequence[int], interval: Interval) -> list[int]:
    a, b = interval
    if not a < b:
        raise InvalidInput(f"the interval of t from {a:g} to {b:g} is empty: its end must be above its start")
    solver = [i for i in places if view.steps[i].end is not None]
    if solver:
        return _solved_within(view, solver, a, b)
    blocks = [i for i in places if view.steps[i].kind != "transition" and not _changes_shape(view.steps[i])]
    if len({view.steps[i].t for i in blocks}) < 2:
        raise InvalidInput(
            f"the interval of t from {a:g} to {b:g}: these steps have no times that tell them apart; name steps, or a "
            "stage"
        )
    return [i for i in blocks if a <= view.steps[i].t < b]


def _solved_within(view: View, places: Sequence[int], a: float, b: float) -> list[int]:
    """The steps of solvers from ``a`` to ``b``, which must be points of the grid of every block that they are in."""
    steps = {i: view.steps[i] for i in places}
    first, last = min(step.t for step in steps.values()), max(step.end for step in steps.values())
    close = 1e-9 * (last - first)
    for t in (a, b):
        cut = next((step for step in steps.values() if step.t + close < t < step.end - close), None)
        if cut is None and any(abs(t - point) <= close for step in steps.values() for point in (step.t, step.end)):
            continue
        where = f"inside the step {cut.label!r}, which ends at {cut.end:g}" if cut else f"not in {first:g} … {last:g}"
        raise InvalidInput(
            f"t = {t:g} is no point of the grid, but {where}: choose points of it, or read the network on a finer "
            "grid, such as dynamics(net, grid=32)"
        )
    return [i for i, step in steps.items() if step.t > a - close and step.end < b + close]


def _changes_shape(step: Step) -> bool:
    return step.shapes is not None and step.shapes[0] != step.shapes[1]
