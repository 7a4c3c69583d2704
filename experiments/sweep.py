"""A sweep's cells as its launcher runs them, and its end: the overview printed, and the exit code decided."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from odyssey.config import TrackingConfig
from odyssey.record import OK, read_record, write_json
from odyssey.runner import LOG_NAME, CellResult, run_cell

_SHOWN_LOG_LINES = 3
_exit_code = 0
# Errors of this process's cells that the sweep's directory could not take.
_unwritten: list[str] = []
_track_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class SweepJob:
    """One cell of a sweep: its number and its whole config."""

    number: int
    config: DictConfig


def run_job(
    config: DictConfig,
    sweep_dir: Path | None = None,
    number: int = 0,
    *,
    environment: dict[str, str] | None = None,
    label_lines: bool = False,
) -> CellResult:
    """Run one cell, send it to the tracker, and leave word of it in the sweep's directory."""
    result = run_cell(config, environment, label_lines)
    if result.record is not None and not result.reused:
        track_job(config, result, sweep_dir)
    if sweep_dir is not None:
        note_cell(sweep_dir, number, result.path, result.reused)
    return result


def track_job(config: DictConfig, result: CellResult, sweep_dir: Path | None) -> None:
    """A failure to track is printed and never fails the cell."""
    tracking, output_dir = _tracking(config), Path(config.output_dir)
    if tracking is None:
        return
    from experiments.tracked import track_cell

    try:
        with _track_one_at_a_time:
            track_cell(tracking, result.record, result.path.parent, output_dir, sweep_dir.name if sweep_dir else None)
    except Exception as error:  # whatever goes wrong around a tracker must not cost a measurement
        _not_logged(error)


def note_cell(sweep_dir: Path, job_number: int, record_path: Path, reused: bool) -> None:
    """Leave word of a finished cell where the sweep's end finds it, whatever process or host ran the cell."""
    note = {"record": str(record_path.resolve()), "reused": reused}
    write_json(note_path(sweep_dir, job_number), note)


def note_error(sweep_dir: Path, job_number: int, reason: str) -> None:
    """Leave word of a cell that could not even leave a record, in this process where the disk is full."""
    try:
        write_json(note_path(sweep_dir, job_number), {"error": reason})
    except OSError:
        _unwritten.append(reason)


def note_path(sweep_dir: Path, job_number: int) -> Path:
    return sweep_dir / "cells" / f"{job_number:05d}.json"


def sweep_cells(sweep_dir: Path) -> list[tuple[dict, Path]]:
    """Records of a sweep's cells and their directories, in the order of its jobs; without the cells that retry=failed
    left out."""
    paths = [Path(note["record"]) for note in _notes(sweep_dir) if "record" in note]
    found = [(read_record(path), path.parent) for path in paths]
    return [(record, directory) for record, directory in found if record is not None]


def sweep_errors(sweep_dir: Path) -> list[str]:
    """Why cells of a sweep have no record, where that is known."""
    return [note["error"] for note in _notes(sweep_dir) if "error" in note] + _unwritten


def _notes(sweep_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((sweep_dir / "cells").glob("*.json"))]


def sweep_exit_code() -> int:
    """0 when every cell of the last sweep of this process ended ok, else 1."""
    return _exit_code


class SweepSummary(Callback):
    """Hydra callback: prints and writes the overview when all jobs of a multirun have ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        from experiments.overview import overview, print_overview

        global _exit_code
        sweep_dir = Path(config.hydra.sweep.dir)
        cells, errors = sweep_cells(sweep_dir), sweep_errors(sweep_dir)
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if not cells and not errors and config.retry == "failed":
            print("retry=failed: no cell of this sweep has a record; nothing was run")
            _exit_code = 0
            return
        failed = [(record, directory) for record, directory in cells if record["outcome"] != OK]
        # Before anything is drawn: Hydra turns what a callback raises into a warning.
        _exit_code = 1 if failed or errors or not cells else 0
        if not cells:
            return
        frame = overview([record for record, _ in cells])
        print()
        print_overview(frame)
        try:
            _write_overview(frame, sweep_dir)
        except OSError as error:
            _exit_code = 1
            print(f"error: the overview was not written ({error}); the records are unharmed", file=sys.stderr)
        _track_sweep(config, cells, sweep_dir)
        _print_failures(failed, len(cells))


def _write_overview(frame, sweep_dir: Path) -> None:
    from experiments.overview import overview_markdown, plot_overview

    table = sweep_dir / "overview.md"
    table.write_text(overview_markdown(frame))
    frame.drop(columns="_method").to_csv(sweep_dir / "overview.csv", index=False)
    print(f"table: {table}  (overview.csv beside it)")
    if plot_overview(frame, sweep_dir / "overview.png"):
        print(f"plot:  {sweep_dir / 'overview.png'}  (overview.svg beside it)")


def _print_failures(failed: list[tuple[dict, Path]], cells: int) -> None:
    if not failed:
        return
    print(f"\n{len(failed)} of {cells} cells did not end ok:")
    for record, directory in failed:
        print(f"  {directory.parent.name}/{directory.name}: {record['outcome']}: {record['reason']}")
        for line in record.get("log_tail", [])[-_SHOWN_LOG_LINES:]:
            # The cell's last line is often the reason itself.
            if record["reason"] not in line:
                print(f"    | {line}")
        print(f"    log: {directory / LOG_NAME}")
    print(f"run only these again: {retry_command()}")


def retry_command(arguments: list[str] | None = None) -> str:
    """The command line of this sweep with retry=failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    kept = [argument for argument in arguments if not argument.startswith(("retry=", "force="))]
    return shlex.join(["python", "run.py", *kept, "retry=failed"])


def _track_sweep(config: DictConfig, cells: list[tuple[dict, Path]], sweep_dir: Path) -> None:
    tracking = _tracking(config)
    if tracking is None:
        return
    from experiments.tracked import track_sweep

    try:
        track_sweep(tracking, cells, sweep_dir, sweep_dir.name)
    except Exception as error:
        _not_logged(error)


def _tracking(config: DictConfig) -> TrackingConfig | None:
    """The tracking group, None for tracking=none."""
    if config.tracking.backend == "none":
        return None
    return OmegaConf.to_object(config.tracking)


def _not_logged(error: Exception) -> None:
    lines = str(error).splitlines() or [""]
    print(f"tracking: not logged ({type(error).__name__}: {lines[0]}); the records are unharmed", file=sys.stderr)
