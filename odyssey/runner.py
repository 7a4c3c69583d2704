"""Starts cells: finds a record that is already there, else runs the cell in a child process and reports its outcome."""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from odyssey.child import ChildProcess
from odyssey.config import RootConfig, validate
from odyssey.errors import OdysseyError
from odyssey.locking import exclusive
from odyssey.methods import existing_checkpoint
from odyssey.models.embedded import TINY_PATH
from odyssey.models.source import checkpoint_fingerprint
from odyssey.outcomes import INTERRUPTED, RESUME, TIMEOUT, of_exit, oom_kills
from odyssey.record import OK, RECORD_NAME, RECORD_VERSION, cell_digest, cell_directory, read_record, write_json

LOG_NAME = "cell.log"
RUNNING_NAME = "running.json"
CONFIG_NAME = "config.yaml"
_LOG_TAIL_LINES = 20
# What is asked of a run, not of a cell.
_NEUTRAL_KEYS = ("force", "retry", "output_dir", "tracking", "timeout_s", "preflight")


@dataclass
class CellResult:
    """How a cell ended: its record, where it is, and whether it was there before.

    record is None only for a cell that retry=failed left out."""

    record: dict | None
    path: Path
    reused: bool


def _fingerprint(config: RootConfig) -> str:
    """Identity of the model without loading or downloading anything."""
    model, existing = config.model, existing_checkpoint(config.method)
    if existing is None and model.path is None and model.name != "tiny":
        return f"hub:{model.hub_id}@{model.revision}"
    path = TINY_PATH if model.path is None else Path(model.path).expanduser()
    if existing is not None:
        path = Path(existing).expanduser()
    try:
        return checkpoint_fingerprint(path)
    except (OdysseyError, OSError):
        return f"unreadable:{path}"


def locate_cell(root: RootConfig) -> tuple[str, Path]:
    """The digest of a cell and its directory."""
    digest = cell_digest(root, _fingerprint(root) if root.gemm.bench == "none" else "")
    return digest, cell_directory(root, digest)


def run_cell(config: DictConfig, environment: dict[str, str] | None = None, label_lines: bool = False) -> CellResult:
    """Run one cell, or find its record. Never raises for what goes wrong inside the cell: that is its outcome.

    environment: variables of the cell's process beside this one's. label_lines: put the cell's name in front of the
    progress that is shown, where several run at a time. Two runs of one cell wait for each other.
    Raises ConfigError for a config that cannot be run.
    """
    root = validate(config)
    digest, directory = locate_cell(root)
    record_path = directory / RECORD_NAME
    label = f"{directory.parent.name} {directory.name.rpartition('-')[0]}"
    if read_record(record_path) is None and root.retry == "failed":
        failed = _failed_under_another_digest(config, directory)
        if failed is None:
            print(f"{label}: left out, it has no record that failed (retry=none runs it)")
            return CellResult(None, record_path, reused=False)
        if not directory.exists():
            failed.rename(directory)
    with exclusive(directory, "running this cell"):
        existing = read_record(record_path)
        if existing is not None and existing["outcome"] == OK and not root.force:
            print(f"{label}: record found, nothing to do (force=true runs it again): {record_path}")
            return CellResult(existing, record_path, reused=True)
        record_path.unlink(missing_ok=True)
        print(f"{label}: running, log in {directory / LOG_NAME}", flush=True)
        record = _run_child(config, directory, digest, environment or {}, f"{label}: " if label_lines else "")
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
    return {key: value for key, value in config.items() if key not in _NEUTRAL_KEYS}


def _run_child(config: DictConfig, directory: Path, digest: str, extra: dict[str, str], line_label: str) -> dict:
    config_path, record_path = directory / CONFIG_NAME, directory / RECORD_NAME
    OmegaConf.save(config, config_path, resolve=True)
    # OpenMP's idle threads spin by default: beside one other busy process that made a cell more than ten times slower.
    # On an idle machine sleeping costs 2 % (a forward pass) to 20 % (learned clipping on the smallest model).
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONUNBUFFERED": "1", **extra}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*source_roots(), environment.get("PYTHONPATH")]))
    if sys.stdout.isatty() and not line_label:
        environment["ODYSSEY_PROGRESS"] = "terminal"
    started = _now()
    write_json(directory / RUNNING_NAME, {"host": socket.gethostname(), "pid": os.getpid(), "started": _text(started)})
    kills_before = oom_kills()
    command = [sys.executable, "-m", "odyssey.cell", str(config_path), str(record_path), digest]
    child = ChildProcess(command, environment, directory / LOG_NAME, line_label)
    try:
        code = child.run(config.timeout_s)
    except BaseException as error:
        if read_record(record_path) is None:
            # retry=failed has to find what an interrupt left behind.
            reason = f"stopped by {type(error).__name__}; {RESUME}"
            record_end(config, directory, digest, INTERRUPTED, reason, started)
        raise
    finally:
        (directory / RUNNING_NAME).unlink(missing_ok=True)
    record = read_record(record_path)
    if record is None:
        if child.stopped == TIMEOUT:
            outcome, reason = TIMEOUT, f"stopped after timeout_s={config.timeout_s:g}; {RESUME}, or raise timeout_s"
        elif child.stopped == INTERRUPTED:
            outcome, reason = INTERRUPTED, f"stopped with the sweep; {RESUME}"
        else:
            outcome, reason = of_exit(code, oom_killed=oom_kills() > kills_before)
        return record_end(config, directory, digest, outcome, reason, started)
    if record["outcome"] != OK:
        record["log_tail"] = _log_tail(directory / LOG_NAME)
        write_json(record_path, record)
    return record


def record_end(
    config: DictConfig,
    directory: Path,
    digest: str,
    outcome: str,
    reason: str,
    started: datetime.datetime | None = None,
    host: str | None = None,
    other_log: Path | None = None,
) -> dict:
    """Write and return the record of a cell whose process could not write one. other_log: whose last lines are taken
    where the cell's own log has none."""
    now = _now()
    record = {
        "version": RECORD_VERSION,
        "digest": digest,
        "outcome": outcome,
        "reason": reason,
        "started": _text(started or now),
        "finished": _text(now),
        "config": OmegaConf.to_container(config, resolve=True),
        "environment": {"host": host or socket.gethostname()},
        "timings": {"total_s": (now - started).total_seconds()} if started else {},
        "model": {"name": directory.parent.name},
        "log_tail": _log_tail(directory / LOG_NAME) or (_log_tail(other_log) if other_log else []),
    }
    write_json(directory / RECORD_NAME, record)
    return record


def read_running(directory: Path) -> dict | None:
    """Host, process and start of a cell that is being run; None when it is not, or its run was killed on this host."""
    try:
        running = json.loads((directory / RUNNING_NAME).read_text())
        if running["host"] == socket.gethostname() and not Path("/proc", str(running["pid"])).exists():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return running


def _log_tail(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    except OSError:
        return []


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _text(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")


def source_roots() -> list[str]:
    """A source tree that is not installed is found by the child as it was found by the parent."""
    root = Path(__file__).resolve().parent.parent
    return [str(root), str(root / "kernels")] if (root / "kernels").is_dir() else []
