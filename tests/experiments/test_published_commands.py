"""The command lines in README.md and docs/: each is one that run.py or `python -m experiments` takes."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from helpers.published import PROJECT

from experiments.__main__ import _parser
from odyssey.config import register_schemas
from odyssey.overrides import check_command_line

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
TINY = PROJECT / "odyssey/models/embedded/tiny/config.json"
# In backquotes, also over the end of a line, or on a line of its own up to a comment; `...` stands for more words.
PROGRAM = r"python (run\.py|-m experiments) "
COMMAND = re.compile(rf"`{PROGRAM}([^`]*)`|^ *{PROGRAM}([^`#\n]*)", re.MULTILINE)


def commands(text: str) -> list[tuple[str, str]]:
    found = (match.groups() for match in COMMAND.finditer(text))
    return [(quoted or alone, " ".join((words or more).split())) for quoted, words, alone, more in found]


COMMANDS = {
    (path.name, program, arguments)
    for path in DOCUMENTS
    for program, arguments in commands(path.read_text())
    if "..." not in arguments and "<" not in arguments
}


def of(wanted: str) -> list:
    return [
        pytest.param(arguments, id=f"{document}: {arguments}")
        for document, program, arguments in sorted(COMMANDS)
        if program == wanted
    ]


def test_the_pattern_finds_commands_of_both_kinds():
    text = """`python run.py -m
a=1` and
    python run.py b=2   # c
python run.py c=3
| `python -m experiments d` | .venv/bin/python run.py e=1"""
    expected = [("run.py", "-m a=1"), ("run.py", "b=2"), ("run.py", "c=3"), ("-m experiments", "d")]
    assert commands(text) == expected
    assert len(of("run.py")) > 20
    assert len(of("-m experiments")) > 10


@pytest.mark.parametrize("arguments", of("run.py"))
def test_run_takes_the_command(arguments):
    register_schemas()
    # One cell of a prepared sweep: tests/experiments/test_prepared_sweeps.py composes them all.
    first = ["hydra.sweeper.params=null"] if "experiment=" in arguments else []
    cells = check_command_line([*shlex.split(arguments), *first], PROJECT / "conf").cells
    assert cells
    if "model=tiny" in arguments:
        positions = json.loads(TINY.read_text())["max_position_embeddings"]
        latency = cells[0].latency
        assert latency.engine == "none" or latency.input_len + latency.output_len <= positions


@pytest.mark.parametrize("arguments", of("-m experiments"))
def test_experiments_takes_the_command(arguments):
    assert _parser().parse_args(shlex.split(arguments)).command
