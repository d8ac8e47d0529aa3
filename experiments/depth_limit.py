"""Which trained nets are near an ODE, and does depth in the limit buy anything?

ODE nets are trained with coarse and with finer grids, each from several seeds; the certificate (``limits.certificate``)
says of each, on held-out data, whether it is near an ODE at the steps it was trained with, or has fitted its grid (Ott
et al. 2021, arXiv 2007.15386; Queiruga et al. 2020, arXiv 2008.02389).

And each is compared with nets of the same stem, transitions and head, trained alike, in which other things stand in
place of its ODE blocks: nothing; a single residual block (one Euler step); residual blocks that share their weights, as
many as the ODE block has steps (equal parameters); and residual blocks with weights of their own, as many as it has
evaluations of f (equal evaluations). The residual nets are lifted, and certified as well.

    python -m experiments.depth_limit cpu --publish results                      digits; 10 minutes
    python -m experiments.depth_limit mnist --data-dir data --publish results    MNIST at 14 × 14 pixels; an hour
    python -m experiments.depth_limit points --publish results                   circles in the plane; 8 minutes
    python -m experiments.depth_limit paper --data-dir data --publish results    CIFAR-10, to ResNet-110's blocks, a GPU

The recipes were settled on after trials from seed 0 that looked at certificates on the test split; the thresholds of
the verdict were fixed before, and are the same for all.

Interrupted at any moment, it takes up its work where it was: at the last epoch of the training under way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from experiments.common import main
from experiments.training import trained
from resode import nets
from resode.blocks import ResidualBlock
from resode.blocks.ode import ODEBlock, ode_blocks
from resode.blocks.tableaux import TABLEAUX
from resode.data.augment import Augment
from resode.data.dataset import Batches
from resode.data.sets import DataSet
from resode.errors import choose
from resode.intervals import interval
from resode.layers.norm import index_statistics
from resode.limits.certificate import Certificate, certificate
from resode.limits.swap import Solved, swap
from resode.nets import Architecture, Net, NetConfig
from resode.nets.sequences import spliced
from resode.runs import Run
from resode.stack import Stack
from resode.train.loop import EVALUATION_BATCH
from resode.train.recalibrate import recalibrate
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup

FLOW, NOTHING, UNTIED, TIED = "flow", "nothing", "untied", "tied"


@dataclass(frozen=True)
class Subject:
    """One of the nets: what stands in each stage, in place of the ODE block or as it.

    Args:
        what: flow (the ODE block), nothing, untied (residual blocks with weights of their own) or tied (residual blocks
            that share theirs).
        count: steps of the flow, or blocks.
        solver: of the flow.
    """

    what: str
    count: int = 0
    solver: str = "euler"

    @property
    def name(self) -> str:
        """What its results are called."""
        if self.what == FLOW:
            return f"{self.solver}-{self.count}"
        return NOTHING if self.what == NOTHING else f"{self.what}-{self.count}"

    @property
    def controls(self) -> dict[str, "Subject"]:
        """What a flow is to be compared with."""
        return {
            "no block": Subject(NOTHING),
            "one block": Subject(UNTIED, 1),
            "equal parameters": Subject(TIED, self.count),
            "equal evaluations": Subject(UNTIED, self.count * TABLEAUX[self.solver].stages),
        }


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        data: digits, mnist, cifar10 …, moons, circles, or imagefolder:PATH.
        data_dir: folder of torchvision's data sets.
        image_size: make the images square, of this many pixels a side; as they are if not given.
        trained: solver and steps of each ODE net; solvers of fixed steps.
        kind: residual branch: preact for images, mlp for points.
        width: channels of the first stage (of images).
        expansion: width inside a branch over its channels; the kind's own if not given.
        time: how f depends on t.
        norm: normalization.
        epochs: of each training.
        batch_size: of each training.
        lr: learning rate of each training.
        warmup: epochs over which it rises.
        weight_decay: of each training.
        clip: largest norm of the gradient.
        flip: mirror training images at random.
        crop: padding of random crops of training images.
        seeds: seeds to train from, at least 2.
        samples: held-out samples for the solver swaps.
        few: held-out samples for the other parts of the certificate.
        device: cpu, cuda, cuda:1.
    """

    data: str = "digits"
    data_dir: str = "data"
    image_size: int | None = None
    trained: tuple[tuple[str, int], ...] = (("euler", 1), ("euler", 2), ("euler", 4), ("euler", 8), ("rk4", 2))
    kind: str = "preact"
    width: int = 8
    expansion: float | None = None
    time: str = "concat"
    norm: str = "group"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    warmup: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    flip: bool = False
    crop: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 1024
    few: int = 32
    device: str = "cpu"

    def flows(self) -> list[Subject]:
        """The ODE nets."""
        return [Subject(FLOW, steps, choose(solver, TABLEAUX, "solver")) for solver, steps in self.trained]

    def subjects(self) -> list[Subject]:
        """All nets, each once."""
        flows = self.flows()
        return list(dict.fromkeys([*flows, *(control for flow in flows for control in flow.controls.values())]))

    def setup(self, subject: Subject, seed: int) -> Setup:
        """The training of one net from one seed; that of a control is of the ODE net that it is made of."""
        steps = subject.count if subject.what == FLOW else 1
        return Setup(
            architecture=Architecture(
                net="odenet",
                kind=self.kind,
                width=self.width,
                expansion=self.expansion,
                time=self.time,
                solver=subject.solver,
                steps=steps,
            ),
            stack=Stack(norm=self.norm, augment=Augment(flip=self.flip, crop=self.crop)),
            data=Data(data=self.data, data_dir=self.data_dir, image_size=self.image_size),
            recipe=Recipe(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                clip=self.clip,
                warmup=self.warmup,
                seed=seed,
            ),
        )


_POINTS = Config(
    data="circles",
    trained=(("euler", 1), ("euler", 2), ("euler", 4), ("euler", 8), ("rk4", 2), ("rk4", 8)),
    kind="mlp",
    expansion=16.0,
    norm="none",
    epochs=50,
)

CONFIGS = {
    "smoke": replace(_POINTS, trained=(("euler", 2), ("rk4", 1)), epochs=1, batch_size=512, seeds=(0, 1), samples=64),
    "cpu": Config(),
    "mnist": Config(
        data="mnist",
        image_size=14,
        epochs=3,
        warmup=0.5,
    ),
    "points": _POINTS,
    # ResNet-20, -38 and -110 have 3, 6 and 18 blocks a stage: so many steps of Euler's, and untied blocks beside them.
    "paper": Config(
        data="cifar10",
        trained=(("euler", 1), ("euler", 2), ("euler", 3), ("euler", 6), ("euler", 18), ("rk4", 1), ("rk4", 4)),
        width=16,
        epochs=100,
        batch_size=128,
        weight_decay=1e-4,
        flip=True,
        crop=4,
        samples=2048,
        few=64,
        device="cuda",
    ),
}


def run(config: Config, out: Run) -> None:
    """Train and certify each net from each seed; compare the ODE nets with their controls."""
    found = {}
    for subject in config.subjects():
        found[subject] = _result(config, subject, out)
        out.save_result(subject.name, found[subject])
    out.save_result("matched", {flow.name: _matched(flow, found) for flow in config.flows()})


def _result(config: Config, subject: Subject, out: Run) -> dict[str, Any]:
    """One net, from all seeds."""
    seeds = [_train(config, subject, seed, out) for seed in config.seeds]
    return {
        **asdict(subject),
        "parameters": seeds[0]["parameters"],
        "evaluations": seeds[0]["evaluations"],
        "accuracy": _interval([each["accuracy"] for each in seeds]),
        "seeds": seeds,
    }


def _train(config: Config, subject: Subject, seed: int, out: Run) -> dict[str, Any]:
    """One net from one seed: trained, and certified on the test split."""
    setup = config.setup(subject, seed)
    data = setup.data.load(seed, config.device)
    settings = setup.net_config(data)
    held = {"net": settings.to_dict(), "subject": asdict(subject), "data": asdict(setup.data)}
    folder = out.path / "trainings" / f"{subject.name}-seed-{seed}"
    done = trained(
        folder,
        {**held, "recipe": asdict(setup.recipe)},
        build(subject, settings, seed).to(config.device),
        data,
        setup.recipe,
        augment=setup.stack.augment,
        device=config.device,
    )
    scores = done["scores"]
    found = {
        "seed": seed,
        "diverged": done["diverged"],
        "parameters": done["parameters"],
        "evaluations": _evaluations(subject, settings),
        "train_accuracy": scores and scores["train"]["accuracy"],
        "accuracy": scores and scores["test"]["accuracy"],
    }
    if subject.what == NOTHING or scores is None:
        return {**found, "initial": None, "certificate": None}
    with Run.open(folder, write=True) as training:
        if not (folder / "results" / "certificate.json").exists():
            training.save_result("certificate", _certify(config, subject, settings, seed, data, training))
        said = training.result("certificate")
    print(f"{subject.name}, seed {seed}: {found['accuracy']:.2%}. {said['certificate']['words']}", flush=True)
    return {**found, **said}


def build(subject: Subject, settings: NetConfig, seed: int) -> Net:
    """The net before training: the ODE net, or what is made of it by putting residual blocks, or none, in its stages.

    All have the stem, the transitions and the head of the ODE net that is drawn from ``seed``; the residual blocks have
    its branches (tied), or branches of their own, of nets that differ in their draw alone, and that no time is told
    (untied).
    """
    net = nets.build(settings, seed)
    if subject.what == FLOW:
        return net
    times = [i / subject.count for i in range(subject.count)]
    if subject.what == TIED:
        branches = [[block.branch] * subject.count for block in _blocks(net)]
    else:
        drawn = [nets.build(replace(settings, time="none"), 1000 * i + seed) for i in range(subject.count)]
        branches = [[_blocks(one)[stage].branch for one in drawn] for stage in range(len(_blocks(net)))]
    stages = {}
    for block, ones in zip(_blocks(net), branches, strict=True):
        if subject.what == TIED:
            index_statistics(block.branch, times)
        stages[block] = [ResidualBlock(branch, t=t) for branch, t in zip(ones, times, strict=True)]
    return spliced(net, stages)


def _blocks(net: nn.Module) -> list[ODEBlock]:
    return list(ode_blocks(net).values())


def _evaluations(subject: Subject, settings: NetConfig) -> int:
    """Evaluations of the branches in one forward pass; of those that stand between the transitions."""
    each = TABLEAUX[subject.solver].stages if subject.what == FLOW else 1
    return settings.stages * subject.count * each


def _certify(
    config: Config, subject: Subject, settings: NetConfig, seed: int, data: DataSet, training: Run
) -> dict[str, Any]:
    """What the certificate says of the trained net, and what solver swaps did to it before training."""
    held_out = Batches(data, "test", EVALUATION_BATCH, config.samples)
    net = build(subject, settings, seed).to(config.device)
    recalibrate(net, held_out)
    initial = _swapped(swap(net, held_out, samples=config.samples).evaluations)
    net.load_state_dict(training.load_checkpoint(map_location=config.device)["model"])
    found = certificate(net, held_out, samples=config.samples, few=config.few, directions=1, progress=True)
    return {"initial": initial, "certificate": summary(found)}


def summary(found: Certificate) -> dict[str, Any]:
    """What is published of a certificate, to five digits."""
    swapped, back, away = found.swap, found.reconstruction, found.distance
    return _rounded(
        {
            "near_ode": found.verdict.near_ode,
            "words": found.verdict.words,
            "checks": {
                check.name: {"passed": check.passed, "value": check.value, "threshold": check.threshold}
                for check in found.verdict.checks
            },
            "count": swapped.count,
            "order": swapped.order,
            "observed_order": swapped.observed_order,
            "critical_steps": swapped.critical_steps,
            "rounding": swapped.rounding,
            "reference": _solved(swapped.reference),
            "swaps": _swapped(swapped.evaluations),
            "reconstruction": back
            and [
                {"block": one.name, "errors": one.errors, "order": one.order, "rounding": one.rounding}
                for one in back.blocks
            ],
            "distance": {one.name: one.relative[-1] for one in away.blocks},
            "relative_increments": [one.relative_increment for one in found.regularity.stretches],
        }
    )


def _swapped(evaluations: Sequence[Solved]) -> list[dict[str, Any]]:
    return [_rounded(_solved(one)) for one in evaluations]


def _solved(one: Solved) -> dict[str, Any]:
    """One solve; of all blocks, which have the same number of steps."""
    names = ("solver", "factor", "nfe", "accuracy", "loss", "error", "change", "lost")
    return {"steps": one.steps[0], **{name: getattr(one, name) for name in names}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _matched(flow: Subject, found: Mapping[Subject, Mapping[str, Any]]) -> dict[str, Any]:
    """An ODE net beside its controls; ``gain``: by how much its accuracy is above theirs, seed by seed."""
    own = found[flow]
    return {
        "verdicts": [each["certificate"] and each["certificate"]["near_ode"] for each in own["seeds"]],
        "accuracy": own["accuracy"],
        "parameters": own["parameters"],
        "evaluations": own["evaluations"],
        "controls": {
            name: {
                "net": control.name,
                **{key: found[control][key] for key in ("accuracy", "parameters", "evaluations")},
                "gain": _interval(
                    [
                        None if a["accuracy"] is None or b["accuracy"] is None else a["accuracy"] - b["accuracy"]
                        for a, b in zip(own["seeds"], found[control]["seeds"], strict=True)
                    ]
                ),
            }
            for name, control in flow.controls.items()
        },
    }


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and 95% interval over the seeds; None where a training diverged."""
    return None if any(value is None for value in values) else asdict(interval(values))


if __name__ == "__main__":
    main("depth_limit", "Which trained nets are near an ODE, and does depth in the limit buy anything?", CONFIGS, run)
