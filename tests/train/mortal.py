"""Trainings that are killed, and trained on by whoever finds them: a script of test_session.

It makes, for each of its setups, the run folders FOLDER/NET/whole (left in peace), FOLDER/NET/EVENT-N (killed by
SIGKILL before the N-th event of a kind, then run again) and FOLDER/NET/mayfly (killed again and again), and
FOLDER/report.json with the exit codes of all their processes, which are forks of this one.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from resode import Dropout, Recipe, Run, Stack
from resode.data import Augment
from resode.nets import Architecture
from resode.train import Data, Setup, train

STACK = Stack(dropout=Dropout(p=0.2), augment=Augment(flip=True, shift=1))
RECIPE = Recipe(epochs=3, batch_size=400, lr=0.05, warmup=1.0)
SETUPS = {
    "resnet": Setup(architecture=Architecture(depth=8, width=4), stack=STACK, recipe=RECIPE),
    "odenet": Setup(
        architecture=Architecture(net="odenet", width=4, steps=2, solver="euler", mask_intervals=2),
        stack=STACK,
        data=Data(label_noise=0.1),
        recipe=Recipe(epochs=3, batch_size=400, optimizer="adamw", lr=0.01, clip=1.0, patience=2),
    ),
}
# The moments of a death: within an epoch, before its record, before and within its checkpoint, and at the end.
DEATHS = {
    "resnet": {"backward": (1, 4, 5), "log": (1, 3), "save_checkpoint": (1, 2, 3), "sync": (1, 9), "finish": (1,)},
    "odenet": {"backward": (5,), "log": (2,), "save_checkpoint": (2,)},
}
EVENTS = {
    "backward": (torch.Tensor, "backward"),
    "log": (Run, "log"),
    "save_checkpoint": (Run, "save_checkpoint"),
    "finish": (Run, "finish"),
    "sync": (os, "fsync"),
}


def die_before(event, count):
    """Make this process kill itself before the ``count``-th ``event``."""
    owner, name = EVENTS[event]
    original, left = getattr(owner, name), [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def life(setup, path, *death):
    """Train in a process of its own, which dies as said; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death:
                die_before(*death)
            train(setup, path)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder):
    torch.set_num_threads(1)
    report = {}
    for net, setup in SETUPS.items():
        setup.data.load(0, "cpu")  # what is imported here need not be imported in each life
        codes = report[net] = {"whole": [life(setup, folder / net / "whole")]}
        for event, counts in DEATHS[net].items():
            for count in counts:
                path = folder / net / f"{event}-{count}"
                codes[path.name] = [life(setup, path, event, count), life(setup, path)]
        path = folder / net / "mayfly"
        codes["mayfly"] = [life(setup, path, "sync", 2)]
        while codes["mayfly"][-1] != 0 and len(codes["mayfly"]) < 20:
            # Long enough for an epoch, and the time comes at another point of each.
            codes["mayfly"].append(life(setup, path, "sync", 7 + len(codes["mayfly"]) % 3))
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
