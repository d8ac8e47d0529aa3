"""What every command line of ours does alike: read typed arguments, and say what is wrong in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from resode.errors import InvalidInput, ResodeError


def read_arguments(kind: Any, program: str, description: str, arguments: Sequence[str] | None = None) -> Any:
    """An instance of ``kind`` (a dataclass, or a union of them for subcommands) from the command line.

    Raises:
        SystemExit: after --help (0), or with one line on the standard error for arguments that make no sense (2).
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, description=description, args=arguments)
    except InvalidInput as problem:
        complain(program, str(problem))
        raise SystemExit(2) from problem
    except SystemExit as leave:
        if leave.code:
            complain(program, _first_paragraph(said.getvalue()))
        raise


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what the user can mend into one line on the standard error, and a non-zero exit."""
    try:
        yield
    except ResodeError as problem:
        complain(program, str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        complain(program, "stopped; the same command goes on from the last checkpoint")
        sys.exit(130)


def complain(program: str, message: str) -> None:
    """Write ``message`` to the standard error, as one line."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)


def _first_paragraph(box: str) -> str:
    """The message in the box that tyro draws, as one line, without tyro's name of the place."""
    kept: list[str] = []
    for line in box.splitlines():
        if line.startswith("╭"):
            continue
        text = line.strip("│╰╯─ ")
        if not text:
            break
        kept.append(text)
    return re.sub(r"^Error parsing \S+: ", "", " ".join(kept)) or box.strip()
