"""`python -m odyssey.tracking.wandb_tracker`: sends the TrackingJob on standard input to Weights & Biases."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from odyssey.tracking.job import TrackingJob


class TrackingError(Exception):
    """The run cannot be kept where it was asked for."""


def send(job: TrackingJob) -> Path | None:
    """Log one run; returns its directory on disk. Raises whatever wandb raises, or TrackingError."""
    import wandb

    settings = job.tracking
    directory = Path(settings.dir).expanduser() if settings.dir else Path(job.directory)
    _check_writable(directory)
    run = wandb.init(
        project=settings.project, entity=settings.entity, group=job.group, job_type=job.job_type, mode=settings.mode,
        dir=str(directory), name=job.name, config=job.config,
    )  # fmt: skip
    with run:
        run.summary.update(job.scalars)
        logged = {table.name: wandb.Table(columns=table.columns, data=table.rows) for table in job.tables}
        logged |= {f"figures/{title}": wandb.Image(path) for title, path in job.images.items()}
        if logged:
            run.log(logged)
        if job.artifact:
            artifact = wandb.Artifact(job.artifact, type="record")
            for name, path in job.artifact_files.items():
                artifact.add_file(path, name=name)
            run.log_artifact(artifact)
    return Path(run.dir).parent


def _check_writable(directory: Path) -> None:
    """wandb itself would go to a temporary directory without a word that lasts."""
    target = directory / "wandb"
    try:
        target.mkdir(parents=True, exist_ok=True)
        probe = target / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrackingError(f"{target}: cannot be written ({error.strerror}); set tracking.dir") from error


def main() -> int:
    try:
        send(TrackingJob.from_json(sys.stdin.read()))
    except Exception as error:  # the caller needs one line, whatever a tracker raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        prefix = "" if isinstance(error, TrackingError) else f"{type(error).__name__}: "
        print(f"{prefix}{lines[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
