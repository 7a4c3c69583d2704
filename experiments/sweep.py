"""The end of a sweep: its cells' records gathered, the overview printed, and the exit code decided."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from odyssey.record import OK, read_record, write_json

_exit_code = 0


def note_cell(sweep_dir: Path, job_number: int, record_path: Path, reused: bool) -> None:
    """Leave word of a finished cell where the sweep's end finds it, whatever process or host ran the cell."""
    note = {"record": str(record_path.resolve()), "reused": reused}
    write_json(sweep_dir / "cells" / f"{job_number:05d}.json", note)


def sweep_records(sweep_dir: Path) -> list[dict]:
    """Records of a sweep's cells, in the order of its jobs; without the cells that retry=failed left out."""
    notes = [json.loads(path.read_text()) for path in sorted((sweep_dir / "cells").glob("*.json"))]
    records = [read_record(Path(note["record"])) for note in notes]
    return [record for record in records if record is not None]


def sweep_exit_code() -> int:
    """0 when every cell of the last sweep of this process ended ok, else 1."""
    return _exit_code


class SweepSummary(Callback):
    """Hydra callback: prints and writes the overview when all jobs of a multirun have ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        from experiments.overview import overview, overview_markdown, plot_overview, print_overview

        global _exit_code
        sweep_dir = Path(config.hydra.sweep.dir)
        records = sweep_records(sweep_dir)
        if not records and config.retry == "failed":
            print("retry=failed: no cell of this sweep has a record; nothing was run")
            _exit_code = 0
            return
        if not records:
            _exit_code = 1
            return
        frame = overview(records)
        print()
        print_overview(frame)
        table = sweep_dir / "overview.md"
        table.write_text(overview_markdown(frame))
        frame.drop(columns="_method").to_csv(sweep_dir / "overview.csv", index=False)
        print(f"table: {table}  (overview.csv beside it)")
        if plot_overview(frame, sweep_dir / "overview.png"):
            print(f"plot:  {sweep_dir / 'overview.png'}  (overview.svg beside it)")
        failed = [record for record in records if record["outcome"] != OK]
        if failed:
            print(
                f"{len(failed)} of {len(records)} cells did not end ok; their reasons are in the table and in cell.log"
            )
        _exit_code = 1 if failed else 0
