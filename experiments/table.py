"""A table, drawn in the terminal, as Markdown, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import csv
import io
import re
import sys
from dataclasses import dataclass, field
from itertools import chain

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

FORMATS = ("terminal", "md", "tex", "csv")


@dataclass(frozen=True)
class Column:
    """key: heading in CSV; heading: elsewhere. format: of a number; None for text. absent: what an empty cell says
    (CSV leaves it empty). explained: an empty cell is marked with the row's reasons."""

    key: str
    heading: str
    format: str | None = None
    absent: str = ""
    explained: bool = False

    def text(self, value: object) -> str:
        if value is None:
            return self.absent
        return self.format.format(value) if self.format and not isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Table:
    """name: of the command that draws it. rows: one value per column, None where there is none. notes: lines below.
    reasons: for each row why its explained column is empty, () where it is not; each stands below the table once, under
    the number that marks its cells. CSV has them in a column of their own."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple, ...]
    notes: tuple[str, ...] = field(default=())
    reasons: tuple[tuple[str, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: a row of {len(row)} values for {len(self.columns)} columns: {row}")
        if self.reasons and len(self.reasons) != len(self.rows):
            raise ValueError(f"{self.name}: reasons for {len(self.reasons)} of {len(self.rows)} rows")

    def marks(self) -> dict[str, int]:
        """The reasons' numbers, in the order in which they are met."""
        return {reason: number for number, reason in enumerate(dict.fromkeys(chain(*self.reasons)), 1)}

    def lines(self) -> list[str]:
        """What stands below the table."""
        absent = next((column.absent for column in self.columns if column.explained), "")
        return [*self.notes, *(f"({number}) {absent}: {reason}." for reason, number in self.marks().items())]

    def shown(self) -> tuple[Column, ...]:
        """Columns that say something; a column of figures stays although it is empty."""
        return tuple(
            column
            for number, column in enumerate(self.columns)
            if column.absent or any(row[number] is not None for row in self.rows)
        )

    def texts(self) -> list[list[str]]:
        shown = self.shown()
        kept = [number for number, column in enumerate(self.columns) if column in shown]
        marks, found = self.marks(), []
        for row, reasons in zip(self.rows, self.reasons or ((),) * len(self.rows), strict=True):
            texts = [self.columns[number].text(row[number]) for number in kept]
            if reasons:
                mark = f" ({', '.join(map(str, sorted(marks[reason] for reason in reasons)))})"
                empty = [self.columns[number].explained and row[number] is None for number in kept]
                texts = [text + mark if marked else text for text, marked in zip(texts, empty, strict=True)]
            found.append(texts)
        return found

    def render(self, format: str) -> str:
        """Raises ValueError for an unknown format."""
        if format not in FORMATS:
            raise ValueError(f"format={format}: allowed: {', '.join(FORMATS)}")
        return {"terminal": self._terminal, "md": self._markdown, "tex": self._latex, "csv": self._csv}[format]()

    def _terminal(self) -> str:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE, header_style="bold")
        for column in self.shown():
            table.add_column(column.heading, justify="right" if column.format else "left")
        for row in self.texts():
            table.add_row(*(Text(text) for text in row))
        # A pipe or a log has no width of its own, and a cell that is cut off says nothing.
        console = Console(file=io.StringIO(), width=None if sys.stdout.isatty() else 180)
        console.print(table)
        return console.file.getvalue().rstrip() + "\n" + "".join(f"{line}\n" for line in self.lines())

    def _markdown(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(column.heading for column in self.shown()) + " |",
            "|" + "".join("---:|" if column.format else "---|" for column in self.shown()),
        ]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in self.texts()]
        lines += ["", *(f"{line}  " for line in self.lines())] if self.lines() else []
        return "\n".join(lines).rstrip() + "\n"

    def _latex(self) -> str:
        shown = self.shown()
        alignment = "".join("r" if column.format else "l" for column in shown)
        lines = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            f"\\caption{{{escape_latex(self.title)}}}",
            f"\\label{{tab:{self.name}}}",
            f"\\begin{{tabular}}{{{alignment}}}",
            "\\toprule",
            " & ".join(escape_latex(column.heading) for column in shown) + " \\\\",
            "\\midrule",
            *(" & ".join(map(escape_latex, row)) + " \\\\" for row in self.texts()),
            "\\bottomrule",
            "\\end{tabular}",
            *(f"\\par\\footnotesize {escape_latex(line)}" for line in self.lines()),
            "\\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _csv(self) -> str:
        """All columns, figures as they are in the records; a word in a column of figures is left to the others."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(column.key for column in self.columns), *(["not_run"] if self.reasons else [])])
        for number, row in enumerate(self.rows):
            values = (
                "" if value is None or (column.format and isinstance(value, str)) else value
                for column, value in zip(self.columns, row, strict=True)
            )
            writer.writerow([*values, *(["; ".join(self.reasons[number])] if self.reasons else [])])
        return file.getvalue()


_LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "µ": "\\textmu{}",
    "×": "$\\times$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_SPECIAL = re.compile("[" + re.escape("".join(_LATEX)) + "]")


def escape_latex(text: str) -> str:
    return _SPECIAL.sub(lambda match: _LATEX[match[0]], text)
