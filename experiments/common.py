"""What every experiment does alike: its command line, its run folder, and the publishing of its results."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from resode.commandline import one_line_errors, read_arguments
from resode.heap import keep_freed_memory
from resode.runs import Run, digest, jsonable, write_atomic

C = TypeVar("C")


def main(
    experiment: str,
    question: str,
    configs: Mapping[str, C],
    run: Callable[[C, Run], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of an experiment: ``python -m experiments.NAME CONFIG [--setting value …] [--publish results]``.

    Args:
        experiment: its name.
        question: what it asks.
        configs: its configurations by name; every setting of one can be changed on the command line.
        run: computes into a run folder. An interrupted run is resumed, a finished one left as it is.
    """
    commands: Any = None
    for name, config in configs.items():
        one = Annotated[_command(name, config), tyro.conf.subcommand(name, description=question)]
        commands = one if commands is None else commands | one
    program = f"python -m experiments.{experiment}"
    if arguments is None and not experiment.startswith("bench_"):  # what is timed has the heap that users have
        keep_freed_memory()
    chosen = read_arguments(commands, program, question, arguments)
    name = type(chosen).__name__
    with one_line_errors(program):
        label = name if chosen.config == configs[name] else f"{name}-{digest(chosen.config)}"
        out = chosen.out or Path("runs") / "experiments" / f"{experiment}-{label}"
        folder = execute(chosen.config, run, out)
        print("Run:", folder.path)
        if chosen.publish is not None:
            target = chosen.publish / f"{experiment}-{label}.json"
            write_atomic(target, json.dumps(collect(experiment, name, folder), indent=1) + "\n")
            print("Published:", target)


def execute(config: C, run: Callable[[C, Run], None], out: Path) -> Run:
    """Run an experiment with ``config`` in the folder ``out``, unless it is finished; the folder."""
    with Run.create(out, jsonable(config), device=getattr(config, "device", "cpu")) as folder:
        if folder.done:
            print(f"Finished before; remove {folder.path} to run it again.")
        else:
            run(config, folder)
            folder.finish()
    return folder


def collect(experiment: str, name: str, folder: Run) -> dict[str, Any]:
    """All results of a run with their provenance, as one object."""
    results = {path.stem: folder.result(path.stem) for path in sorted((folder.path / "results").glob("*.json"))}
    return {
        "experiment": experiment,
        "configuration": name,
        "config": folder.config,
        "environment": json.loads((folder.path / "environment.json").read_text()),
        "results": results,
    }


def _command(name: str, config: Any) -> type:
    """A dataclass ``name``: the settings of ``config``, the run folder, and where to publish."""
    settings = ("config", Annotated[type(config), tyro.conf.arg(name="")], field(default=config))
    out = Annotated[Path | None, tyro.conf.arg(help="Folder of the run.")]
    publish = Annotated[Path | None, tyro.conf.arg(help="Copy the results, with their provenance, into this folder.")]
    return make_dataclass(name, [settings, ("out", out, None), ("publish", publish, None)], frozen=True)
