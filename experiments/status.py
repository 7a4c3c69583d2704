"""The cells under a directory: how each one ended, how long it took, where, and why it failed."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from experiments.overview import describe_cell
from experiments.table import Column, Table
from odyssey.record import OK, RECORD_NAME, read_record
from odyssey.runner import read_running

NO_RECORD, RUNNING = "no record", "running"
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
    if len(rows) > counts[OK] + counts[NO_RECORD] + counts[RUNNING]:
        notes.append("retry=failed with the sweep's command runs those again that have a record and did not end ok.")
    if counts[NO_RECORD]:
        notes.append("A cell without a whole record was killed with its run.py; the same command runs it again.")
    return Table("status", "Cells", columns, tuple(rows), tuple(notes))


def _rows(directory: Path) -> list[tuple]:
    cells = {path.parent for name in (RECORD_NAME, _CELL_FILE) for path in directory.glob(f"*/*/{name}")}
    cells |= {path.parent for path in directory.glob(f"*/*/*/{RECORD_NAME}")}
    return [_row(cell) for cell in cells]


def _row(cell: Path) -> tuple:
    record = read_record(cell / RECORD_NAME)
    if record is None:
        running = read_running(cell)
        method = cell.name.rpartition("-")[0]
        if running is None:
            return cell.parent.name, method, NO_RECORD, None, None, None, str(cell)
        seconds = (datetime.now(UTC) - datetime.fromisoformat(running["started"])).total_seconds()
        return cell.parent.name, method, RUNNING, seconds, running["host"], None, str(cell)
    return (
        record.get("model", {}).get("name") or cell.parent.name,
        describe_cell(record),
        record["outcome"],
        record.get("timings", {}).get("total_s"),
        record.get("environment", {}).get("host"),
        record.get("reason"),
        str(cell),
    )
