"""What one tracked run is made of, and the process that sends it: one that fails or hangs costs no measurement."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

from odyssey.config import TrackingConfig


@dataclass
class TrackedTable:
    """A table as rows of plain values; columns are named as in its CSV."""

    name: str
    columns: list[str]
    rows: list[list]


@dataclass
class TrackingJob:
    """One run. Paths are strings.

    directory: where the run is kept on disk unless tracking.dir says otherwise. job_type: cell or sweep. config: of
    the cell. scalars: its figures under dotted names. images: title -> PNG file. artifact: its name; artifact_files:
    name in the artifact -> file.
    """

    tracking: TrackingConfig
    directory: str
    name: str
    group: str | None
    job_type: str
    config: dict = field(default_factory=dict)
    scalars: dict[str, float | str] = field(default_factory=dict)
    tables: list[TrackedTable] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    artifact: str | None = None
    artifact_files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrackingJob:
        content = json.loads(text)
        content["tracking"] = TrackingConfig(**content["tracking"])
        content["tables"] = [TrackedTable(**table) for table in content["tables"]]
        return cls(**content)


def track(job: TrackingJob) -> bool:
    """Send one run from a process of its own; returns whether that worked. Says in one line why it did not."""
    command = [sys.executable, "-m", "odyssey.tracking.wandb_tracker"]
    environment = {**os.environ, "WANDB_SILENT": "true"}
    try:
        done = subprocess.run(
            command, input=job.to_json(), capture_output=True, text=True, check=False,
            timeout=job.tracking.timeout_s, env=environment,
        )  # fmt: skip
        problem = None if done.returncode == 0 else _last_line(done.stderr) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"no answer within tracking.timeout_s={job.tracking.timeout_s:g}"
    except (OSError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        print(f"tracking: {job.name}: not logged ({problem}); the records are unharmed", file=sys.stderr, flush=True)
    return problem is None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
