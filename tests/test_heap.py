"""A process that keeps the memory it frees: its pages are handed out once."""

import os
import platform
import subprocess
import sys

import pytest

from resode import heap
from resode.cli import main

TENSORS = """
import resource, sys
import torch
from resode.heap import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())

def step():
    held = [torch.zeros(2**21) + 1.0 for _ in range(8)]  # 8 MiB each, all freed at its end

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")


def lines(how, **environment):
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", TENSORS, how], capture_output=True, text=True, check=True, env={**free, **environment}
    )
    return done.stdout.split()


@glibc
def test_memory_that_is_kept_is_not_handed_out_again():
    (handed_out,) = lines("leave")
    kept, again = lines("keep")
    assert kept == "True"
    assert int(again) < int(handed_out) / 10


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
