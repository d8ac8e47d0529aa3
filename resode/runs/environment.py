"""Where, when and by which code a result was computed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("resode", "torchvision", "torchdiffeq", "numpy")


def environment(device: str | torch.device) -> dict[str, Any]:
    """Where, when and by which code something is computed on ``device``: what goes beside every result.

    ``git`` has the revision of resode's own checkout, and whether any Python file or pyproject.toml there differs
    from it (untracked ones count: an experiment not yet committed changes numbers as well; results and notes do
    not). It is None when resode runs from somewhere else, as from site-packages.
    """
    device = torch.device(device)
    return {
        "time": now(),
        # The interpreter by its name alone: where it lies is of this machine.
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its CUDA
        | {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": {"type": device.type, "name": _device_name(device)},
        "threads": torch.get_num_threads(),
        "git": revision(Path(__file__).resolve()),
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.machine()


def revision(source: Path) -> dict[str, Any] | None:
    """The revision of the checkout that tracks ``source``, or None.

    That git tracks the file is the point: an installed package often lies in another repository (a .venv).
    """

    def git(*arguments: str) -> str | None:
        return _output("git", "-C", str(source.parent), *arguments)

    found = git("rev-parse", "HEAD")
    if found is None or git("ls-files", "--error-unmatch", "--", source.name) is None:
        return None
    code = (":(top)*.py", ":(top)pyproject.toml")
    changes = git("status", "--porcelain", "--untracked-files=all", "--", *code)
    return {"revision": found, "dirty": None if changes is None else changes != ""}


def _output(*command: str) -> str | None:
    # In a git hook these name the repository of the hook, not of the package.
    elsewhere = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    variables = {key: value for key, value in os.environ.items() if key not in elsewhere}
    try:
        return subprocess.run(
            command,
            env=variables | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
