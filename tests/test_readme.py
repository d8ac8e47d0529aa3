"""What the README shows, works."""

import re
from pathlib import Path

import pytest

from resode.cli import main

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs_and_prints_what_it_says(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"print\(.*\)  # (.*)", code)
    assert printed == said


def test_the_commands_of_the_readme_are_there():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m (experiments\.\w+)", README.read_text()):
        assert (README.parent / f"{module.replace('.', '/')}.py").exists()


def rows_of_techniques():
    """The rows of the table of techniques: what, flags, tests."""
    section = README.read_text().split("## What a training can use")[1].split("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_every_technique_of_the_table_has_flags_that_are_there(capsys):
    said = ""
    for command in ("train", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said += capsys.readouterr().out
    flags = {flag for _, shown, _ in rows_of_techniques() for flag in re.findall(r"--[a-z0-9.-]+", shown)}
    assert len(flags) > 50
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}\b", said), flag


def test_every_technique_of_the_table_has_tests_that_are_there():
    for what, _, tests in rows_of_techniques():
        named = re.findall(r"`([^`]+)`", tests)
        folder = (README.parent / named[0]).parent
        for name in named:
            path = README.parent / name if name.startswith("tests") else folder / name
            assert path.exists(), f"{what}: {name}"
