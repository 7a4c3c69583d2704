"""Published tables and sentences held against committed records, at the precision in which they are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Of each cell of a row: its pattern, and the values of the figures in it.
Cells = Iterator[tuple[str, Sequence[float]]]


@cache
def record(name: str) -> dict:
    return json.loads((PROJECT / "results" / name).read_text())


@cache
def products(name: str) -> dict[tuple[str, int, str], dict]:
    """The rows with a correct result, by size, tokens and kernel."""
    rows = (row for row in record(name)["rows"] if row.get("correct"))
    return {(f"{row['n']} x {row['k']}", row["m"], row["kernel"]): row for row in rows}


def prints(text: str, value: float) -> bool:
    """Whether `text`, a number, is `value` at the precision of the text."""
    return f"{value:.{len(text.partition('.')[2])}f}" == text


def figures(pattern: str) -> str:
    """A regular expression for `pattern`, in which each {} is a number."""
    return re.escape(pattern).replace(r"\{\}", f"({NUMBER.pattern})")


def cell_is(cell: str, pattern: str, values: Sequence[float]) -> bool:
    """Whether a cell is `pattern`, with {} for each of `values` in turn; bold does not count."""
    found = re.fullmatch(figures(pattern), cell.replace("**", ""))
    return bool(found) and all(map(prints, found.groups(), values))


@dataclass(frozen=True)
class Table:
    """A table: its file, how its header row starts, its rows' first cells, and what the rest of a row has to be.

    keys: the leading cells of all rows, in order. expected: of such cells, the pattern and the values of each cell that
    follows, computed from records alone.
    """

    file: str
    header: str
    keys: tuple[tuple[str, ...], ...]
    expected: Callable[..., Cells]

    def lines(self, text: str) -> range:
        """The numbers of the lines of the table's rows; raises ValueError unless there is one table."""
        lines = text.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(self.header)]
        if len(starts) != 1:
            raise ValueError(f"{self.file}: {len(starts)} tables start with {self.header!r}")
        first = end = starts[0] + 2
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        return range(first, end)

    def problems(self, text: str) -> list[str]:
        """A line for each cell that is not the record's, or one if the rows are not those of the records."""
        lines = text.splitlines()
        rows = [
            [cell.strip() for cell in lines[number][1:].removesuffix("|").split("|")] for number in self.lines(text)
        ]
        width = len(self.keys[0])
        found = [tuple(row[:width]) for row in rows]
        if found != list(self.keys):
            return [f"rows {sorted(set(found) ^ set(self.keys)) or found} are not those of the records"]
        return [
            f"{' | '.join(key)}: {cell!r} is not {pattern.format(*values)!r}"
            for key, row in zip(self.keys, rows, strict=True)
            for cell, (pattern, values) in zip_longest(row[width:], self.expected(*key), fillvalue=("no cell", ()))
            if not cell_is(cell, pattern, values)
        ]


@dataclass(frozen=True)
class Sentence:
    """A sentence with figures: its file, its words with {} for each figure, and what the figures have to be."""

    file: str
    words: str
    values: Callable[[], Sequence[float]]

    def problems(self, text: str) -> list[str]:
        found = re.findall(figures(self.words), " ".join(text.split()))
        if len(found) != 1:
            return [f"{len(found)} sentences are {self.words!r}"]
        printed = found[0] if isinstance(found[0], tuple) else found
        pairs = zip(printed, self.values(), strict=True)
        return [f"{self.words!r}: {text} is not {value}" for text, value in pairs if not prints(text, value)]

    def misprints(self, text: str) -> Iterator[str]:
        """Copies of the text with each figure in turn misprinted: its last digit is another."""
        text = " ".join(text.split())
        (found,) = re.finditer(figures(self.words), text)
        for group in range(1, found.re.groups + 1):
            last = found.end(group) - 1
            yield f"{text[:last]}{(int(text[last]) + 1) % 10}{text[last + 1 :]}"
