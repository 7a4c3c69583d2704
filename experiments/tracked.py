"""What is sent to Weights & Biases: a run for every cell with its share of the paper's tables, and one for a sweep."""

from __future__ import annotations

import tempfile
from pathlib import Path

from experiments.catalogue import CATALOGUE, Selection
from experiments.measured import MixedProtocolsError
from experiments.overview import describe_cell, overview, plot_overview
from experiments.sources import Sources, cell_sources
from experiments.table import Table
from odyssey.config import TrackingConfig
from odyssey.quantization.checkpoint import MANIFEST_NAME
from odyssey.record import RECORD_NAME
from odyssey.tracking import TrackedTable, TrackingJob, track

_SCALAR_SECTIONS = ("accuracy", "latency", "size", "memory", "timings")


def track_cell(tracking: TrackingConfig, record: dict, directory: Path, output_dir: Path, group: str | None) -> bool:
    """One run: config, scalars, the rows of the paper's tables that the cell fills, figures, record and manifest."""
    model = record.get("model", {}).get("name") or record["config"]["model"]["name"]
    files = {RECORD_NAME: directory / RECORD_NAME}
    checkpoint = record.get("quantization", {}).get("checkpoint")
    if checkpoint is not None:
        files[MANIFEST_NAME] = output_dir / checkpoint / MANIFEST_NAME
    job = TrackingJob(
        tracking=tracking,
        directory=str(directory),
        name=f"{model} {describe_cell(record)}",
        group=tracking.group or group,
        job_type="cell",
        config=record["config"],
        scalars={**scalars(record), "outcome": record["outcome"]},
        artifact=f"record-{record['digest']}",
        artifact_files={name: str(path) for name, path in files.items() if path.is_file()},
    )
    return _send(job, cell_sources([(record, directory)]), only_measured=True)


def track_sweep(tracking: TrackingConfig, records: list[tuple[dict, Path]], directory: Path, group: str | None) -> bool:
    """One run for the sweep: the paper's tables and figures of all its cells, and the overview."""
    job = TrackingJob(
        tracking=tracking,
        directory=str(directory),
        name=f"tables {directory.name}",
        group=tracking.group or group,
        job_type="sweep",
        scalars={"cells": len(records), "ok": sum(record["outcome"] == "ok" for record, _ in records)},
    )
    frame = overview([record for record, _ in records]).drop(columns="_method")
    job.tables.append(TrackedTable("overview", list(frame.columns), [list(map(_plain, row)) for row in frame.values]))
    return _send(job, cell_sources(records), only_measured=False)


def scalars(record: dict) -> dict[str, float]:
    """The figures of a record under dotted names, without configuration, samples and lists."""
    found: dict[str, float] = {}
    for section in _SCALAR_SECTIONS:
        _collect(record.get(section), section, found)
    return found


def _collect(value, name: str, found: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}", found)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found[name] = value


def measured_tables(sources: Sources, only_measured: bool) -> dict[str, Table]:
    """The paper's tables in which at least one figure is measured; only_measured leaves out the other rows."""
    found = {}
    for name, entry in CATALOGUE.items():
        try:
            table = entry.table(sources, Selection(explain=False))
        except MixedProtocolsError as error:
            print(f"tracking: {name} is left out: {error}")
            continue
        key = next((number for number, column in enumerate(table.columns) if column.key.startswith("measured")), None)
        rows = [row for row in table.rows if key is not None and row[key] is not None]
        if rows:
            kept = tuple(rows) if only_measured else table.rows
            found[name] = Table(name, table.title, table.columns, kept, table.notes)
    return found


def _send(job: TrackingJob, sources: Sources, only_measured: bool) -> bool:
    tables = measured_tables(sources, only_measured)
    for name, table in tables.items():
        rows = [list(map(_figure, table.columns, row)) for row in table.rows]
        job.tables.append(TrackedTable(name, [column.key for column in table.columns], rows))
    with tempfile.TemporaryDirectory(prefix="odyssey-figures-") as folder:
        for name in tables:
            if CATALOGUE[name].draw:
                job.images[name] = str(CATALOGUE[name].draw(sources, Path(folder) / name)[0])
        plot = Path(folder) / "overview.png"
        if plot_overview(overview(sources.records), plot):
            job.images["overview"] = str(plot)
        return track(job)


def _figure(column, value):
    """A column of figures takes numbers alone: a word in it (an outcome) is what the note says, too."""
    return None if column.format and isinstance(value, str) else _plain(value)


def _plain(value):
    return value.item() if hasattr(value, "item") else value
