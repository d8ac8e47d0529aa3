"""What the benchmark measures: problems, the pieces of work they consist of, and the cases these are compared in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

OURS = "resode"
FLOOR = "floor"
PEERS = ("torchdiffeq", "torchdyn", "torchode")
LAYOUTS = ("contiguous", "channels-last")
DEFAULT_LAYOUT, OUR_LAYOUT = LAYOUTS
"""As a state comes, and as the users of our blocks are told to feed it."""
SAME, WRITTEN = "same module", "as written"

PLAIN_SOLVERS = {
    "torchdiffeq": ("euler", "rk4", "dopri5"),
    "torchdyn": ("euler", "rk4", "dopri5"),
    "torchode": ("euler", "dopri5"),
}
"""What each peer is asked for; torchode has no method of order 4 on a fixed grid."""

COMPILED = {"default": "compiled", "reduce-overhead": "CUDA graphs"}
"""What modes of torch.compile are called."""

TWIN = {"rk4": "rk4-38"}
"""Our solver with the tableau that torchdiffeq has under a name: its "rk4" is the 3/8 rule."""

PARITY = {"exact": 1e-4, "near": 0.1}
"""Largest relative difference of gradients: on one grid in float32, and where each solver steps as it likes (for
torchdiffeq, beyond t = 1 and back by an interpolation)."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A solver, on a state of (batch, channels, side, side).

    Args:
        solver: its name, ours.
        channels, side: of the square images.
        steps: of a fixed grid; None where a tolerance is given.
        tolerance: rtol and atol of an adaptive solve.
        precision: float32, or bf16 (autocast).
        compiled: modes of torch.compile in which ours is measured, too.
    """

    solver: str
    channels: int
    side: int
    steps: int | None = None
    tolerance: float | None = None
    precision: str = "float32"
    compiled: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Such as "rk4, 8 steps, 64 × 16², bf16", or "dopri5, tol 1e-3, 16 × 32²"."""
        control = f"{self.steps} steps" if self.steps is not None else f"tol {self.tolerance:.0e}".replace("e-0", "e-")
        said = f"{self.solver}, {control}, {self.channels} × {self.side}²"
        return said if self.precision == "float32" else f"{said}, {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One way to do a problem: by one peer, in one memory layout, with one way to the gradient.

    Args:
        table, case: where its row stands.
        label: what its row is called; several of one peer may stand in a case.
        compiled: the mode of torch.compile by which the steps are compiled; None: they are not.
        subject: a way of ours whose cost the others' is compared with.
        evaluations: length of the floor's chain of convolutions, in evaluations of f.
        timed: take part in the rounds.
        memory: measure the peak memory, in a fresh process.
    """

    table: str
    case: str
    peer: str
    label: str
    problem: Problem
    batch: int
    seed: int
    device: str
    layout: str = DEFAULT_LAYOUT
    gradient: str = "backprop"
    compiled: str | None = None
    subject: bool = False
    evaluations: int = 0
    timed: bool = True
    memory: bool = False

    def chain(self, evaluations: int) -> "Work":
        """The same with a chain of ``evaluations``."""
        return replace(self, evaluations=evaluations)

    @property
    def twin(self) -> str:
        """The solver whose gradient is compared with torchdiffeq's."""
        return TWIN.get(self.problem.solver, self.problem.solver) if self.peer == OURS else self.problem.solver

    @property
    def parity(self) -> str:
        """How near its gradient must be to the reference: a key of :data:`PARITY`, or why it need not be."""
        if self.peer == "torchdyn" and self.problem.solver == "rk4":
            return "excluded: torchdyn's rk4 evaluates f(t, h) at other times than the method's"
        if self.gradient == "adjoint":
            return "excluded: the continuous adjoint"
        if self.gradient == "reversible":
            return "excluded: another scheme"
        if self.problem.precision != "float32":
            return f"excluded: {self.problem.precision}"
        if self.problem.tolerance is None:
            return "exact"
        if self.peer in ("torchdyn", "torchode"):
            return "excluded: it differentiates its choice of step sizes, too"
        return "near"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Pieces of work compared with each other, and with the floor in both layouts."""

    table: str
    name: str
    works: tuple[Work, ...]
    floor: tuple[Work, ...]


def compared(table: str, problem: Problem, common: dict, peers: Sequence[str], layouts: Sequence[str]) -> Case:
    """Everyone who has the solver, in every layout; ours compiled, too, where the problem says so.

    Compiling takes longer than all else, so it is done in our users' layout alone. Of adaptive solves the peak memory
    is measured, too, as each library's users call it.
    """
    works = []
    weighed = table == WRITTEN and problem.tolerance is not None
    for layout in layouts:
        given = {"table": table, "case": problem.name, "problem": problem, "layout": layout, **common}
        ours, theirs = weighed and layout == OUR_LAYOUT, weighed and layout == LAYOUTS[0]
        works.append(Work(peer=OURS, label=OURS, subject=True, memory=ours, **given))
        if layout == OUR_LAYOUT:
            compiled = {mode: f"{OURS}, {COMPILED.get(mode, mode)}" for mode in problem.compiled}
            works += [
                Work(peer=OURS, label=said, compiled=mode, subject=True, **given) for mode, said in compiled.items()
            ]
        asked = [peer for peer in peers if problem.solver in PLAIN_SOLVERS[peer]]
        works += [Work(peer=peer, label=peer, memory=theirs, **given) for peer in asked]
    return _case(works)


def checkpoint(problem: Problem, common: dict, peers: Sequence[str]) -> Case:
    """A solve at little memory: ours by checkpoints (and by the adjoint) against torchdiffeq's ``odeint_adjoint``."""
    name = f"{problem.name}, little memory"
    works = []
    for layout in LAYOUTS:
        # Memory is that of each as its users call it; it does not depend on the layout but by chance.
        given = {"table": WRITTEN, "case": name, "problem": problem, "layout": layout, **common}
        ours, theirs = layout == OUR_LAYOUT, layout == DEFAULT_LAYOUT
        works.append(
            Work(peer=OURS, label=f"{OURS}, checkpoint", gradient="checkpoint", subject=True, memory=ours, **given)
        )
        works.append(Work(peer=OURS, label=f"{OURS}, adjoint", gradient="adjoint", memory=ours, **given))
        if "torchdiffeq" in peers:
            works.append(
                Work(peer="torchdiffeq", label="torchdiffeq, adjoint", gradient="adjoint", memory=theirs, **given)
            )
    return _case(works)


def reversible(problem: Problem, common: dict, few: int, many: int) -> Case:
    """Ours, reversible: time against backpropagation at equal NFE, and memory at ``few`` and ``many`` steps.

    A reversible step evaluates f twice as often, so it makes half the steps.
    """
    given = {"table": WRITTEN, "case": f"{problem.name}, reversible", "peer": OURS, "layout": OUR_LAYOUT, **common}
    halved = replace(problem, steps=problem.steps // 2)
    works = [
        Work(label=f"{OURS}, reversible", gradient="reversible", subject=True, problem=halved, **given),
        Work(label=f"{OURS}, backprop", problem=problem, **given),
    ]
    for gradient in ("reversible", "backprop"):
        for steps in (few, many):
            label = f"{OURS}, {gradient}, {steps} steps"
            long = replace(problem, steps=steps)
            works.append(Work(label=label, gradient=gradient, problem=long, timed=False, memory=True, **given))
    return _case(works)


def _case(works: list[Work]) -> Case:
    first = works[0]
    floor = (replace(first, peer=FLOOR, label=FLOOR, layout=at, subject=False, memory=False) for at in LAYOUTS)
    return Case(
        table=first.table,
        name=first.case,
        works=tuple(works),
        floor=tuple(replace(work, gradient="backprop", compiled=None) for work in floor),
    )


def turns(cases: Sequence[Case], repetitions: int) -> int:
    """Number of preparations, repetitions and measurements of memory, for a progress bar."""
    return sum(_turns(case, repetitions) for case in cases)


def _turns(case: Case, repetitions: int) -> int:
    timed = sum(work.timed for work in case.works) + len(case.floor)
    return timed * (1 + repetitions) + sum(work.memory for work in case.works)
