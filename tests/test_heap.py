"""A process that keeps the memory it frees, for its next tensors."""

import os
import platform
import subprocess
import sys

import pytest

from resode import heap
from resode.cli import main

TENSORS = """
import os, sys
from pathlib import Path
import torch
from resode.heap import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

before = resident()
held = [torch.ones(6 * 2**20) for _ in range(4)]  # 24 MiB each
del held
print(resident() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")


def lines(how, **environment):
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", TENSORS, how], capture_output=True, text=True, check=True, env={**free, **environment}
    )
    return done.stdout.split()


@glibc
def test_memory_that_is_freed_stays_with_the_process():
    (left,) = lines("leave")
    kept, stays = lines("keep")
    assert kept == "True"
    assert float(left) < 20.0
    assert float(stays) > 80.0  # of 96 MiB


@glibc
def test_what_the_environment_says_of_the_heap_stands():
    assert lines("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert lines("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=4")[0] == "False"


def test_nothing_is_asked_of_another_library(monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("asked"))
    assert not heap.keep_freed_memory()


def test_the_command_keeps_it_where_the_process_is_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr("resode.cli.keep_freed_memory", lambda: asked.append(1))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert not asked
    monkeypatch.setattr(sys, "argv", ["resode", "train", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert asked
