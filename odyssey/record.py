"""Records: one JSON file per cell, content-addressed by what the cell was asked to do, written atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from odyssey.config import RootConfig
from odyssey.methods import existing_checkpoint, settings_dict

RECORD_NAME = "record.json"
RECORD_VERSION = 1
OK = "ok"


def cell_digest(config: RootConfig, model_fingerprint: str) -> str:
    """12 hex digits over everything that determines a cell's results (not where they go or how they are tracked)."""
    if config.gemm.bench != "none":
        content = {"version": RECORD_VERSION, "gemm": dataclasses.asdict(config.gemm), "device": config.device}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    content = {
        "version": RECORD_VERSION,
        "method": {"name": config.method.name, **settings_dict(config.method)},
        "model": model_fingerprint,
        "calibration": dataclasses.asdict(config.calibration),
        "accuracy": dataclasses.asdict(config.accuracy),
        "latency": dataclasses.asdict(config.latency),
        "data": _data_state(config),
        "seed": config.seed,
        "device": config.device,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _data_state(config: RootConfig) -> dict[str, str | None]:
    """Content hashes of the files that the user named: a changed file is another cell."""
    paths = {"calibration": config.calibration.path}
    if config.accuracy.perplexity is not None:
        paths["perplexity"] = config.accuracy.perplexity.path
    state: dict[str, str | None] = {"root": config.data.root}
    for name, path in paths.items():
        try:
            file = Path(path).expanduser() if path else None
            state[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
        except OSError:
            # Not ours to read, or gone since: the cell says so.
            state[name] = None
    return state


def cell_directory(config: RootConfig, digest: str) -> Path:
    """<output_dir>/<model>/<method>-<digest>; of single matrix products <output_dir>/gemm/<library>-<digest>."""
    name = config.method.name if config.gemm.bench == "none" else config.gemm.bench
    return Path(config.output_dir) / model_directory_name(config) / f"{name}-{digest}"


def model_directory_name(config: RootConfig) -> str:
    """The model's name in output paths: a local directory's own name unless model.name says otherwise."""
    if config.gemm.bench != "none":
        return "gemm"
    path = config.model.path if config.model.path is not None else existing_checkpoint(config.method)
    if path is not None and config.model.name in ("tiny", "local"):
        return Path(path).expanduser().resolve().name
    return config.model.name


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read_record(path: Path) -> dict | None:
    """A record, or None when there is none or it cannot be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "outcome" in record else None


def find_records(output_dir: Path) -> list[dict]:
    """All records under an output directory, oldest first; each with its own path under "path"."""
    records = []
    for path in output_dir.glob(f"*/*/{RECORD_NAME}"):
        record = read_record(path)
        if record is not None:
            records.append({**record, "path": str(path)})
    return sorted(records, key=lambda record: record.get("started", ""))
