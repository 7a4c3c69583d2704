"""Every format of a table can be read back."""

import io

import pandas as pd
import pytest

from experiments.table import Column, Table, escape_latex

TABLE = Table(
    "example",
    "50 % of R&D_costs",
    (
        Column("method", "method"),
        Column("measured", "our figure", "{:.2f}", absent="not run"),
        Column("difference", "difference", "{:+.2f}"),
        Column("note", "note"),
    ),
    (("A & B", 1.234, 0.5, None), ("C|D", None, None, None), ("E_1", "oom", None, None)),
    ("A note with 100 % and a_b.",),
)


def test_csv_has_full_precision_and_empty_cells():
    frame = pd.read_csv(io.StringIO(TABLE.render("csv")))
    assert list(frame.columns) == ["method", "measured", "difference", "note"]
    assert frame["measured"].tolist()[0] == 1.234
    assert frame["measured"].isna().tolist() == [False, True, True]
    assert frame["measured"].dtype == float
    assert frame["method"].tolist() == ["A & B", "C|D", "E_1"]


def cells(line):
    """Cells of a LaTeX row: split at & that no backslash precedes."""
    return line.removesuffix("\\\\").replace("\\&", "\0").split("&")


def test_latex_is_balanced():
    text = TABLE.render("tex")
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].splitlines()
    rows = [line for line in body if line != "\\midrule"]
    assert len(rows) == 4
    assert all(line.endswith(" \\\\") for line in rows)
    # The note column is empty and left out.
    assert {len(cells(line)) for line in rows} == {3}
    assert "\\begin{tabular}{lrr}" in text
    assert text.count("\\begin{") == text.count("\\end{")
    unescaped = text.replace("\\{", "").replace("\\}", "")
    assert unescaped.count("{") == unescaped.count("}")
    assert "\\caption{50 \\% of R\\&D\\_costs}" in text
    assert "A \\& B" in text
    assert not [line for line in text.splitlines()[1:] if "%" in line.replace("\\%", "")]


def test_latex_escapes():
    assert escape_latex("a\\b~^<>{}#$") == (
        "a\\textbackslash{}b\\textasciitilde{}\\textasciicircum{}\\textless{}\\textgreater{}\\{\\}\\#\\$"
    )


def test_markdown_rows_have_the_same_cells():
    lines = [line for line in TABLE.render("md").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}
    assert lines[2] == "| A & B | 1.23 | +0.50 |"
    assert lines[3] == "| C\\|D | not run |  |"


def test_terminal_shows_everything():
    text = TABLE.render("terminal")
    for expected in ("50 % of R&D_costs", "1.23", "+0.50", "not run", "oom", "A note with 100 %"):
        assert expected in text


def test_what_is_refused():
    with pytest.raises(ValueError, match="format=html: allowed: terminal, md, tex, csv"):
        TABLE.render("html")
    with pytest.raises(ValueError, match="a row of 1 values for 2 columns"):
        Table("t", "t", (Column("a", "a"), Column("b", "b")), ((1,),))
