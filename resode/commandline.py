"""What every command line of ours does alike: read typed arguments, and say what is wrong in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import dropwhile, takewhile
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
        complain(program, "stopped; the same command goes on from what it has saved")
        sys.exit(130)


def complain(program: str, message: str) -> None:
    """Write ``message`` to the standard error, as one line."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)


def _first_paragraph(box: str) -> str:
    """The message in the box that tyro draws, as one line; of a value that makes no sense it names the option alone.

    The box has a title, and rules between its paragraphs. It is drawn with lines where the standard output is UTF-8,
    and otherwise with blanks and hyphens.
    """
    _title, *lines = box.splitlines() or [""]
    texts = (re.sub(r"[╰╯─]+|-{3,}", "", line).strip("│ ") for line in lines)
    paragraph = takewhile(bool, dropwhile(lambda text: not text, texts))
    message = re.sub(r"^Error parsing (?:(--\S+: )|\S+: )", lambda place: place[1] or "", " ".join(paragraph))
    return message or box.strip()
