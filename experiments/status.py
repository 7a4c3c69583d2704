"""The cells under a directory: how each one ended, how long it took, where, and why it failed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from experiments.overview import describe_method
from experiments.table import Column, Table
from odyssey.record import OK, RECORD_NAME, read_record

NO_RECORD = "no record"
_CELL_FILE = "config.yaml"


def status_table(directories: list[Path]) -> Table:
    """One row per cell that was started, those that did not end ok first."""
    rows = [row for directory in directories for row in _rows(directory)]
    rows.sort(key=lambda row: (row[2] == OK, row[0], row[1], row[-1]))
    counts = Counter(row[2] for row in rows)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) or "no cells"
    columns = (
        Column("model", "model"),
        Column("method", "method"),
        Column("outcome", "outcome"),
        Column("seconds", "seconds", "{:.0f}"),
        Column("host", "host"),
        Column("reason", "reason"),
        Column("cell", "cell"),
    )
    notes = [f"{len(rows)} cells: {summary}."]
    if len(rows) > counts[OK] + counts[NO_RECORD]:
        notes.append("retry=failed with the sweep's command runs those again that have a record and did not end ok.")
    if counts[NO_RECORD]:
        notes.append("A cell without a record is running, or was killed with the run.py that started it.")
    return Table("status", "Cells", columns, tuple(rows), tuple(notes))


def _rows(directory: Path) -> list[tuple]:
    cells = {path.parent for name in (RECORD_NAME, _CELL_FILE) for path in directory.glob(f"*/*/{name}")}
    cells |= {path.parent for path in directory.glob(f"*/*/*/{RECORD_NAME}")}
    return [_row(cell) for cell in cells]


def _row(cell: Path) -> tuple:
    record = read_record(cell / RECORD_NAME)
    if record is None:
        return cell.parent.name, cell.name.rpartition("-")[0], NO_RECORD, None, None, None, str(cell)
    return (
        record.get("model", {}).get("name") or cell.parent.name,
        describe_method(record["config"]["method"]),
        record["outcome"],
        record.get("timings", {}).get("total_s"),
        record.get("environment", {}).get("host"),
        record.get("reason"),
        str(cell),
    )
