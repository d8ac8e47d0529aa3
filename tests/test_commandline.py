"""What every command line says where its arguments make no sense, and where it is stopped."""

import io
from dataclasses import dataclass

import pytest

from resode.commandline import one_line_errors, read_arguments


@dataclass(frozen=True)
class Settings:
    """Settings."""

    depth: int = 20
    lr: float = 0.1


@pytest.fixture(params=["utf-8", "UTF-8", "ascii"], autouse=True)
def _encoding(request, monkeypatch):
    """The box around a message has other lines where the standard output is not known to be UTF-8."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=request.param))


@pytest.mark.parametrize("option", ["depth", "lr"])
def test_a_value_that_makes_no_sense_is_named_with_its_option(option, capsys):
    with pytest.raises(SystemExit) as left:
        read_arguments(Settings, "program", "Does things.", [f"--{option}", "many"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"program: --{option}: ")
    assert line.endswith("'many'"), "the first paragraph, and no more"


def test_an_option_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        read_arguments(Settings, "program", "Does things.", ["--depht", "3"])
    assert capsys.readouterr().err == "program: Unrecognized options: --depht, 3\n"


def test_an_interruption_is_one_line_and_the_status_of_its_signal(capsys):
    with pytest.raises(SystemExit) as left, one_line_errors("program"):
        raise KeyboardInterrupt
    assert left.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("program: stopped")
