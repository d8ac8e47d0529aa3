"""What does the trainer cost beside the bare step, and a DataLoader loop beside it?

Every contender trains the same net by SGD with momentum, on the same images, with the same batch size, precision and
layout, compiled or not:

* *fit*: ``resode.train.fit`` as its users call it, for one epoch, its set-up included: images as uint8 on the device,
  cropped and flipped there;
* *bare step*: forward pass, loss, backward pass and the optimizer's step, and nothing else, on batches that lie ready
  on the device. It is what fit cannot do without, and fit should reach 95 % of its images a second;
* *DataLoader loop*: a loop as most people write it with torchvision (``experiments/bench/plain_loop.py``), with so many
  worker processes. These are started before anything is measured, and stay;
* *bare step, timm's net*: the same step of timm's ``ResNet`` made into CIFAR's. Its shortcuts into stages 2 and 3 are
  1×1 convolutions, where He's pad zeros, so *bare step, projections* stands beside it, ours with the same shortcuts and
  as many parameters. Where timm is not installed, neither takes part.

Images and labels are random: speed does not depend on what they show. All contenders take turns, each of so many steps,
after a turn of each that is not measured; a ratio is of medians, with the smallest and the largest within a round.

    python -m experiments.bench_train cpu --publish results     about 3 minutes on 2 CPU cores
    python -m experiments.bench_train cuda --publish results    on a GPU; compiling takes a few minutes more
    python -m experiments.bench_train graphs --publish results  the same with CUDA graphs
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tqdm import tqdm

from experiments.bench import turns
from experiments.bench.station import arithmetic
from experiments.bench.summary import ratio
from experiments.bench.trainers import BARE, FIT, PLAIN, PROJECTED, TIMM, Contender, Subject, contenders, timm_absent
from experiments.common import main
from resode.errors import InvalidInput, ResodeError, choose, positive
from resode.nets import NetConfig
from resode.runs import Run
from resode.runs.environment import package_version
from resode.train.recipe import Recipe
from resode.train.session import check_device

NETS = ("resnet", "odenet")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark.

    Args:
        nets: resnet, odenet.
        precisions: float32, bfloat16 (autocast): of each net a case.
        channels_last: lay images and weights channels-last in memory.
        compile: compile the nets by torch.compile.
        compile_mode: its mode; reduce-overhead launches the kernels as CUDA graphs.
        depth: depth 6n + 2 of resnet.
        width: channels of the first stage; an even number.
        solver: of odenet.
        solver_steps: steps in each of its ODE blocks.
        side: of the square images.
        batch: images in a batch.
        steps: steps of the optimizer in a turn.
        workers: worker processes of each DataLoader loop.
        lr: learning rate: random labels are learned by none, and the loss shall stay finite.
        repetitions: measured rounds.
        lead_in: unmeasured turns at the start of each (a GPU lowers its clock while others have theirs).
        seed: of weights, images and order.
        device: cpu, cuda, cuda:1.

    Raises:
        InvalidInput: for an unknown name or a number that makes no sense.
    """

    nets: tuple[Literal["resnet", "odenet"], ...] = NETS
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    channels_last: bool = False
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    depth: int = 20
    width: int = 16
    solver: str = "midpoint"
    solver_steps: int = 2
    side: int = 32
    batch: int = 128
    steps: int = 8
    workers: tuple[int, ...] = (0, 2)
    lr: float = 0.01
    repetitions: int = 7
    lead_in: int = 0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for net in self.nets:
            choose(net, NETS, "net")
        for precision in self.precisions:
            choose(precision, PRECISIONS, "precision")
        for name in ("batch", "steps", "repetitions"):
            positive(getattr(self, name), name)
        if self.batch < 2:
            raise InvalidInput(f"batch is {self.batch}, over which batch norm averages: at least 2 is expected")
        if self.width % 2:
            raise InvalidInput(f"width is {self.width}: an even number is expected, as timm's net can have no other")
        if min(self.workers, default=0) < 0:
            raise InvalidInput(f"workers are {self.workers}: numbers of at least 0 are expected")
        self.subjects()  # whatever their nets and recipes refuse is refused here

    def subjects(self) -> dict[str, Subject]:
        """What is trained, by the name of the case."""
        return {f"{self._named(net)}, {p}": self._subject(net, p) for net in self.nets for p in self.precisions}

    def _named(self, net: str) -> str:
        which = f"ResNet-{self.depth}" if net == "resnet" else f"ODE net, {self.solver}, {self.solver_steps} steps"
        return f"{which}, width {self.width}"

    def _subject(self, net: str, precision: str) -> Subject:
        size, solve = (self.side, self.side), {"solver": self.solver, "steps": self.solver_steps}
        recipe = Recipe(
            epochs=1,
            batch_size=self.batch,
            lr=self.lr,
            schedule="constant",
            precision=precision,
            channels_last=self.channels_last,
            seed=self.seed,
        )
        return Subject(
            net=NetConfig(net=net, depth=self.depth, width=self.width, size=size, **solve),
            recipe=recipe,
            steps=self.steps,
            compile=self.compile and self.compile_mode,
            device=self.device,
        )


CUDA = Config(
    precisions=("bfloat16", "float32"),
    channels_last=True,
    compile=True,
    batch=512,
    steps=97,  # an epoch of CIFAR's 50,000 images
    workers=(0, 8),
    lead_in=1,
    device="cuda",
)
CONFIGS = {
    "smoke": Config(depth=8, width=4, solver_steps=1, side=8, batch=4, steps=2, workers=(0,), repetitions=1),
    "cpu": Config(),
    "cuda": CUDA,
    "graphs": replace(CUDA, compile_mode="reduce-overhead"),
}


class Differs(ResodeError, ArithmeticError):
    """A contender with another net: its time is of no meaning."""


def run(config: Config, out: Run) -> None:
    """Every case, its ratios, and a table of both.

    Raises:
        InvalidInput: for a device that is not there.
        Differs: before a case is measured, when nets that should be of one size are not.
        TrainingError: when a loss is not finite.
    """
    check_device(config.device)
    absent = {} if (why := timm_absent()) is None else {"timm": why}
    for peer, why in absent.items():
        print(f"{peer} is skipped: {why}", flush=True)
    cases = []
    with tqdm(desc="bench", unit="turn", leave=False, disable=None) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        for name, subject in config.subjects().items():
            bar.write(name)
            there = contenders(subject, config.workers)
            check_alike(there)
            ways = [turns.Way(each.name, each, {"parameters": each.parameters}) for each in there]
            rows = turns.rows(ways, None, config.device, config.repetitions, config.lead_in, tick)
            for row, each in zip(rows, there, strict=True):
                row |= {"first_loss": each.losses[0], "images_per_second": _per_second(row, subject.images)}
            kind = arithmetic(config.device, "bf16" if subject.recipe.precision == "bfloat16" else "float32")
            cases.append({"case": name, "arithmetic": kind, "rows": rows, "ratios": list(ratios(rows))})
            if config.compile:
                torch.compiler.reset()
    peers = {"timm": None if absent else package_version("timm")}
    found = {"threads": torch.get_num_threads(), "peers": peers, "absent": absent, "cases": cases}
    said = table(found, config)
    out.save_result("bench", found)
    out.write("table.md", said)
    print(said)


def check_alike(there: Sequence[Contender]) -> None:
    """Check that all have as many parameters as the bare step's net, and timm's as many as ours with its shortcuts.

    Raises:
        Differs: when one has not.
    """
    size = {each.name: each.parameters for each in there}
    for name, parameters in size.items():
        like = PROJECTED if name in (PROJECTED, TIMM) else BARE
        if parameters != size[like]:
            raise Differs(f"{name} trains {parameters} parameters, and {like} {size[like]}: they must be as many")


def _per_second(row: Mapping[str, Any], images: int) -> dict[str, float]:
    """Of the seconds of turns: images a second."""
    said = row["seconds"]
    return {"median": images / said["median"], "min": images / said["max"], "max": images / said["min"], "n": said["n"]}


def ratios(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Images a second of fit over those of the bare step and the DataLoader loops, and of our net over timm's."""
    by = {row["way"]: row for row in rows}
    pairs = [(FIT, BARE), *((FIT, way) for way in by if way.startswith(PLAIN)), (PROJECTED, TIMM)]
    for of, over in pairs:
        if of in by and over in by:
            yield {"of": of, "over": over, **ratio(by[over], by[of])}


def table(found: Mapping[str, Any], config: Config) -> str:
    """All of it, in Markdown."""
    lines = [f"{peer}: skipped, {why}" for peer, why in found["absent"].items()]
    layout = "channels-last" if config.channels_last else "contiguous"
    how = f"{layout}, {f'compiled ({config.compile_mode})' if config.compile else 'not compiled'}"
    where = f"{config.device}, {found['threads']} threads"
    for case in found["cases"]:
        lines += [
            "",
            f"### {case['case']} ({case['arithmetic']}), {how}: batch {config.batch} × {config.side}² ({where})",
        ]
        lines += [
            "",
            f"Turns of {config.steps} steps. The loss is the mean over the first turn, of a bare step its last.",
            "",
        ]
        lines += ["| contender | parameters | loss | images/s (range, n) |", "|---|---|---|---|"]
        lines += [_row(row) for row in case["rows"]]
    lines += ["", "### Images a second of the one over those of the other (above 1: the first is faster)", ""]
    lines += ["| case | of | over | ratio (range) |", "|---|---|---|---|"]
    for case in found["cases"]:
        lines += [f"| {case['case']} | {each['of']} | {each['over']} | {_ratio(each)} |" for each in case["ratios"]]
    return "\n".join(lines).strip() + "\n"


def _row(row: Mapping[str, Any]) -> str:
    said = row["images_per_second"]
    speed = f"{said['median']:.4g} ({said['min']:.4g}–{said['max']:.4g}, {said['n']})"
    return f"| {row['way']} | {row['parameters']:,} | {row['first_loss']:.3f} | {speed} |"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.3f} ({found['min']:.3f}–{found['max']:.3f})"


if __name__ == "__main__":
    main("bench_train", "What does the trainer cost beside the bare step, and a DataLoader loop?", CONFIGS, run)
