"""A finished cell as a Weights & Biases run: config, scalars, and an artifact with the record and the manifest."""

from __future__ import annotations

import sys
from pathlib import Path

from odyssey.config import TrackingConfig
from odyssey.quantization.checkpoint import MANIFEST_NAME
from odyssey.record import RECORD_NAME


def track_cell(tracking: TrackingConfig, record: dict, directory: Path, output_dir: Path) -> None:
    """Log one record. A failure to track is printed and never fails the cell."""
    try:
        _track(tracking, record, directory, output_dir)
    except Exception as error:  # whatever goes wrong in a tracker must not cost a measurement
        print(f"tracking: not logged ({type(error).__name__}: {error}); the record is unharmed", file=sys.stderr)


def _track(tracking: TrackingConfig, record: dict, directory: Path, output_dir: Path) -> None:
    import wandb

    model = record.get("model", {}).get("name", record["config"]["model"]["name"])
    name = f"{model} {record['config']['method']['name']}"
    run = wandb.init(
        project=tracking.project, entity=tracking.entity, group=tracking.group, mode=tracking.mode,
        dir=str(directory), name=name, config=record["config"], reinit="finish_previous",
    )  # fmt: skip
    with run:
        run.summary.update(scalars(record))
        run.summary["outcome"] = record["outcome"]
        artifact = wandb.Artifact(f"record-{record['digest']}", type="record")
        artifact.add_file(str(directory / RECORD_NAME))
        checkpoint = record.get("quantization", {}).get("checkpoint")
        if checkpoint is not None:
            artifact.add_file(str(output_dir / checkpoint / MANIFEST_NAME))
        run.log_artifact(artifact)


def scalars(record: dict) -> dict[str, float]:
    """The figures of a record under dotted names, without configuration, samples and lists."""
    found: dict[str, float] = {}
    for section in ("accuracy", "latency", "size", "memory", "timings"):
        _collect(record.get(section), section, found)
    return found


def _collect(value, name: str, found: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}", found)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found[name] = value
