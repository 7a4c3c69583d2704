"""Starts cells: finds a record that is already there, else runs the cell in a child process and reports its outcome."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from odyssey.config import RootConfig, validate
from odyssey.errors import OdysseyError
from odyssey.models.embedded import TINY_PATH
from odyssey.models.source import checkpoint_fingerprint
from odyssey.record import OK, RECORD_NAME, RECORD_VERSION, cell_digest, model_directory_name, read_record, write_json

LOG_NAME = "cell.log"
_LOG_TAIL_LINES = 20


@dataclass
class CellResult:
    """How a cell ended: its record, where it is, and whether it was there before.

    record is None only for a cell that retry=failed left out."""

    record: dict | None
    path: Path
    reused: bool


def _fingerprint(config: RootConfig) -> str:
    """Identity of the model without loading or downloading anything."""
    model = config.model
    if model.path is None and model.name != "tiny":
        return f"hub:{model.hub_id}@{model.revision}"
    path = TINY_PATH if model.path is None else Path(model.path).expanduser()
    try:
        return checkpoint_fingerprint(path)
    except OdysseyError:
        return f"unreadable:{path}"


def run_cell(config: DictConfig) -> CellResult:
    """Run one cell, or find its record. Never raises for what goes wrong inside the cell: that is its outcome.

    Raises ConfigError for a config that cannot be run.
    """
    root = validate(config)
    digest = cell_digest(root, _fingerprint(root))
    name = model_directory_name(root)
    directory = Path(root.output_dir) / name / f"{root.method.name}-{digest}"
    record_path = directory / RECORD_NAME
    existing = read_record(record_path)
    label = f"{name} {root.method.name}"
    if existing is not None and existing["outcome"] == OK and not root.force:
        print(f"{label}: record found, nothing to do (force=true runs it again): {record_path}")
        return CellResult(existing, record_path, reused=True)
    if existing is None and root.retry == "failed":
        failed = _failed_under_another_digest(config, directory)
        if failed is None:
            print(f"{label}: left out, it has no record that failed (retry=none runs it)")
            return CellResult(None, record_path, reused=False)
        if not directory.exists():
            failed.rename(directory)
    directory.mkdir(parents=True, exist_ok=True)
    record_path.unlink(missing_ok=True)
    print(f"{label}: running, log in {directory / LOG_NAME}", flush=True)
    record = _run_child(config, directory, digest)
    _track(root, record, directory)
    seconds = record.get("timings", {}).get("total_s")
    took = f" in {seconds:.0f} s" if seconds is not None else ""
    if record["outcome"] == OK:
        print(f"{label}: ok{took}: {record_path}", flush=True)
    else:
        print(f"{label}: {record['outcome']}{took}: {record['reason']}", file=sys.stderr, flush=True)
    return CellResult(record, record_path, reused=False)


def _failed_under_another_digest(config: DictConfig, directory: Path) -> Path | None:
    """The directory of a cell of the same settings that failed: a model or text that was absent then, and is there now,
    has changed the digest."""
    wanted = _settings(OmegaConf.to_container(config, resolve=True))
    method = directory.name.rpartition("-")[0]
    for path in sorted(directory.parent.glob(f"{method}-*/{RECORD_NAME}")):
        record = read_record(path)
        if record is not None and record["outcome"] != OK and _settings(record["config"]) == wanted:
            return path.parent
    return None


def _settings(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in ("force", "retry", "output_dir", "tracking")}


def _run_child(config: DictConfig, directory: Path, digest: str) -> dict:
    config_path, record_path = directory / "config.yaml", directory / RECORD_NAME
    OmegaConf.save(config, config_path, resolve=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*_source_roots(), environment.get("PYTHONPATH")]))
    if sys.stdout.isatty():
        environment["ODYSSEY_PROGRESS"] = "terminal"
    started = _now()
    with (directory / LOG_NAME).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "odyssey.cell", str(config_path), str(record_path), digest],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            for line in child.stdout:
                log.write(line)
                log.flush()
                if line.startswith((b"quantizing", b"perplexity", b"latency", b"lm-eval", b"task ")):
                    print("  " + line.decode(errors="replace").rstrip(), flush=True)
            code = child.wait()
        except BaseException as error:
            child.kill()
            child.wait()
            if read_record(record_path) is None:
                # retry=failed has to find what an interrupt left behind.
                reason = f"stopped by {type(error).__name__}; run again to resume"
                write_json(record_path, _end_without_record(config, directory, digest, "interrupted", reason, started))
            raise
    record = read_record(record_path)
    if record is None:
        outcome = "killed" if code < 0 else "failed"
        record = _end_without_record(config, directory, digest, outcome, _death(code), started)
        write_json(record_path, record)
    return record


def _end_without_record(
    config: DictConfig, directory: Path, digest: str, outcome: str, reason: str, started: datetime.datetime
) -> dict:
    """The record of a cell whose process could not write one."""
    now = _now()
    return {
        "version": RECORD_VERSION,
        "digest": digest,
        "outcome": outcome,
        "reason": reason,
        "started": started.isoformat(timespec="seconds"),
        "finished": now.isoformat(timespec="seconds"),
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": {"host": socket.gethostname()},
        "timings": {"total_s": (now - started).total_seconds()},
        "log_tail": (directory / LOG_NAME).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:],
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _death(code: int) -> str:
    if code == -9:
        return "the cell's process was killed (SIGKILL), often for lack of memory; run again to resume"
    if code < 0:
        return f"the cell's process died of signal {-code}; run again to resume"
    return f"the cell's process exited with code {code} and left no record; see {LOG_NAME}"


def _source_roots() -> list[str]:
    """A source tree that is not installed is found by the child as it was found by the parent."""
    root = Path(__file__).resolve().parent.parent
    return [str(root), str(root / "kernels")] if (root / "kernels").is_dir() else []


def _track(root: RootConfig, record: dict, directory: Path) -> None:
    if root.tracking.backend == "none":
        return
    from odyssey.tracking.wandb_tracker import track_cell

    track_cell(root.tracking, record, directory, Path(root.output_dir))
