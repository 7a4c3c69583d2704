"""Cells as Slurm array jobs (submitit): what each one asks for comes from its preflight.

A job that is preempted, or that reaches its time limit, is queued again and goes on at the block it reached. The sweep
waits for its cells by their records and by `scontrol show job`, which also a cluster without accounting answers.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from experiments.launchers.settings import AUTO, SlurmSettings
from experiments.launchers.slurm_queue import ENDED, JobState, job_states, outcome_of
from experiments.sweep import SweepJob, note_path, run_job, track_job
from odyssey.config import typed_config, validate
from odyssey.outcomes import INTERRUPTED, RESUME, TIMEOUT
from odyssey.preflight import Prediction, predict
from odyssey.record import RECORD_NAME, read_record
from odyssey.runner import CellResult, locate_cell, read_running, record_end, source_roots

FOLDER = "slurm"
_GIB = 2**30
# A record may reach this host's view of a shared file system some seconds after its job has left the queue.
_GRACE_S = 20.0
_MINIMUM_MINUTES = 30


@dataclass(frozen=True)
class Request:
    """What a cell asks of the cluster; cells that ask for the same are one array."""

    partition: str | None
    gpus: int
    memory_gb: int
    minutes: int


def request_for(prediction: Prediction, device: str, settings: SlurmSettings) -> Request:
    """memory and time: what is configured, else the prediction times its factor, rounded up to whole GiB and, above
    half an hour, whole hours."""
    gpus = (0 if device == "cpu" else 1) if settings.gpus == AUTO else settings.gpus
    memory = settings.memory_gb or settings.memory_factor * prediction.host_bytes / _GIB
    minutes = settings.time_min
    if minutes is None:
        minutes = settings.time_factor * prediction.seconds / 60
        minutes = 60 * math.ceil(minutes / 60) if minutes > _MINIMUM_MINUTES else _MINIMUM_MINUTES
    partition = settings.gpu_partition or settings.partition if gpus else settings.partition
    return Request(partition, gpus, max(1, math.ceil(memory)), minutes)


class CellJob:
    """What a Slurm job does: one cell, by its config file in the sweep's directory."""

    def __call__(self, sweep_dir: str, number: int) -> None:
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        config = read_config(Path(sweep_dir), number)
        _stop_on_terminate()
        try:
            run_job(config, Path(sweep_dir), number)
        except UncompletedJobError as error:
            # submitit's word for the last time limit that may be reached.
            root = validate(config)
            digest, directory = locate_cell(root)
            reason, log = f"{error} {RESUME}, or raise time_min", JobEnvironment().paths.stdout
            record = record_end(config, directory, digest, TIMEOUT, reason, other_log=log)
            finish_job(config, CellResult(record, directory / RECORD_NAME, reused=False), Path(sweep_dir), number)

    def checkpoint(self, sweep_dir: str, number: int):
        """Called by submitit before it queues the job again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, sweep_dir, number)


def _stop_on_terminate() -> None:
    """SIGTERM (scancel) stops the cell at once; submitit's own handler would wait for SIGKILL."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def finish_job(config, result: CellResult, sweep_dir: Path, number: int) -> None:
    """Track and note a cell whose record was written for it."""
    from experiments.sweep import note_cell

    track_job(config, result, sweep_dir)
    note_cell(sweep_dir, number, result.path, reused=False)


def config_path(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / FOLDER / f"cell-{number:05d}.yaml"


def read_config(sweep_dir: Path, number: int):
    return typed_config(OmegaConf.load(config_path(sweep_dir, number)))


def launch(jobs: list[SweepJob], sweep_dir: Path, settings: dict) -> None:
    """Submit all cells and wait for the last one. Ctrl-C leaves them in the queue and says how to go on."""
    parsed = SlurmSettings(**settings)
    sweep_dir = sweep_dir.resolve()
    (sweep_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    arrays: dict[Request, list[SweepJob]] = defaultdict(list)
    for job in jobs:
        OmegaConf.save(job.config, config_path(sweep_dir, job.number), resolve=True)
        root = validate(job.config)
        arrays[request_for(predict(root), root.device, parsed)].append(job)
    waiting: dict[str, SweepJob] = {}
    try:
        for request, cells in arrays.items():
            submit(cells, request, parsed, sweep_dir, waiting)
        _wait(waiting, sweep_dir, parsed.poll_s)
    except KeyboardInterrupt:
        left = sorted({job_id.partition("_")[0] for job_id in waiting})
        print(
            f"the jobs stay in the queue; to stop them, too: scancel {' '.join(left)}; logs: {sweep_dir / FOLDER}",
            file=sys.stderr,
        )
        raise


def submit(
    cells: list[SweepJob], request: Request, settings: SlurmSettings, sweep_dir: Path, waiting: dict[str, SweepJob]
) -> None:
    """Submit one array; its cells are put into `waiting` by their job ids."""
    import submitit

    environment_path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*source_roots(), environment_path]))
    executor = submitit.SlurmExecutor(folder=sweep_dir / FOLDER, max_num_timeout=settings.max_requeues)
    options = {
        "job_name": f"odyssey-{sweep_dir.name}",
        "time": request.minutes,
        "mem": f"{request.memory_gb}GB",
        "cpus_per_task": settings.cpus,
        "ntasks_per_node": 1,
        "nodes": 1,
        "signal_delay_s": settings.signal_delay_s,
        "array_parallelism": settings.at_once or len(cells),
        "stderr_to_stdout": True,
        "partition": request.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "gpus_per_node": request.gpus or None,
        "setup": settings.setup or None,
        "additional_parameters": settings.sbatch or None,
    }
    executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    submitted = executor.map_array(CellJob(), [str(sweep_dir)] * len(cells), [job.number for job in cells])
    waiting.update(zip((job.job_id for job in submitted), cells, strict=True))
    first = submitted[0].job_id.partition("_")[0]
    partition = f" in partition {request.partition}" if request.partition else ""
    print(
        f"Slurm job {first}: {len(cells)} cells{partition}, each {settings.cpus} cores, "
        f"{request.gpus} GPUs, {request.memory_gb} GiB, {request.minutes} min; logs in {sweep_dir / FOLDER}",
        flush=True,
    )


def _wait(waiting: dict[str, SweepJob], sweep_dir: Path, poll_s: float) -> None:
    """Until every cell has left word of its end, or has been given a record in its place."""
    shown: dict[str, str] = {}
    gone_since: dict[str, float] = {}
    while waiting:
        states = job_states(sorted({job_id.partition("_")[0] for job_id in waiting}))
        for job_id, job in list(waiting.items()):
            if note_path(sweep_dir, job.number).is_file():
                _announce(job, job_id, "done", shown)
                del waiting[job_id]
                continue
            state = states.get(job_id)
            if state is not None and state.name not in ENDED:
                gone_since.pop(job_id, None)
                _announce(job, job_id, state.text(), shown)
                continue
            since = gone_since.setdefault(job_id, time.monotonic())
            if time.monotonic() - since > _GRACE_S:
                _record_lost(job, job_id, state, sweep_dir)
                del waiting[job_id]
        if waiting:
            time.sleep(poll_s)


def _announce(job: SweepJob, job_id: str, text: str, shown: dict[str, str]) -> None:
    if shown.get(job_id) != text:
        shown[job_id] = text
        print(f"  cell {job.number} (job {job_id}): {text}", flush=True)


def _record_lost(job: SweepJob, job_id: str, state: JobState | None, sweep_dir: Path) -> None:
    """The record of a cell whose whole job was killed: Slurm says why."""
    config = read_config(sweep_dir, job.number)
    root = validate(config)
    digest, directory = locate_cell(root)
    log = sweep_dir / FOLDER / f"{job_id}_0_log.out"
    outcome, reason = outcome_of(state, job_id, log)
    running = read_running(directory)
    record = read_record(directory / RECORD_NAME)
    if record is None or record["outcome"] == INTERRUPTED:
        # Its last word, on being told to stop, was not why.
        host = running["host"] if running else state.node if state else None
        record = record_end(config, directory, digest, outcome, reason, host=host, other_log=log)
    print(f"  cell {job.number} (job {job_id}): {record['outcome']}: {record['reason']}", file=sys.stderr, flush=True)
    finish_job(config, CellResult(record, directory / RECORD_NAME, reused=False), sweep_dir, job.number)
