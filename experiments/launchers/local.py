"""Cells on this machine, several at a time, each with a GPU of its own."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path

from experiments.launchers.settings import LocalSettings
from experiments.sweep import SweepJob, note_error, run_job
from odyssey.child import stop_all

_NO_GPU = ""


class GpuPool:
    """GPUs to be taken one at a time; cells that need none pass."""

    def __init__(self, gpus: list[str]) -> None:
        self._gpus = gpus
        self._free: queue.Queue[str] = queue.Queue()
        for gpu in gpus:
            self._free.put(gpu)

    def take(self, device: str) -> str | None:
        """Waits for a GPU and returns it; None where the cell's environment needs no change."""
        if not self._gpus:
            return None
        return _NO_GPU if device == "cpu" else self._free.get()

    def give_back(self, gpu: str | None) -> None:
        if gpu:
            self._free.put(gpu)


def launch(jobs: list[SweepJob], sweep_dir: Path, settings: dict) -> None:
    """Run all cells; returns when the last one has ended. Ctrl-C stops those that run and raises KeyboardInterrupt."""
    parsed = LocalSettings(**settings)
    gpus, at_once = parsed.usable_gpus(), parsed.at_once(len(jobs))
    on_gpu = sum(job.config.device != "cpu" for job in jobs)
    if gpus and min(at_once, on_gpu) > len(gpus):
        print(f"hydra.launcher.jobs={parsed.jobs}: there are {len(gpus)} GPUs, further cells wait for one", flush=True)
    pool = GpuPool(gpus)
    waiting: queue.SimpleQueue[SweepJob] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            gpu = pool.take(job.config.device)
            try:
                if not stopped.is_set():
                    environment = cell_environment(gpu, at_once)
                    run_job(job.config, sweep_dir, job.number, environment=environment, label_lines=at_once > 1)
            except Exception as error:  # e.g. a full disk: the other cells are tried all the same
                lines = str(error).splitlines() or [""]
                note_error(sweep_dir, job.number, f"cell {job.number}: {type(error).__name__}: {lines[0]}")
            finally:
                pool.give_back(gpu)

    # Events, not Thread.join: an interrupted join takes a thread that still runs for one that has ended.
    finished = [threading.Event() for _ in range(at_once)]

    def work_to_the_end(done: threading.Event) -> None:
        try:
            work()
        finally:
            done.set()

    for done in finished:
        threading.Thread(target=work_to_the_end, args=(done,), daemon=True).start()
    try:
        for done in finished:
            while not done.wait(0.2):
                pass
    except BaseException:
        stopped.set()
        stop_all()
        for done in finished:
            done.wait(30)
        raise


def cell_environment(gpu: str | None, at_once: int) -> dict[str, str]:
    """The cell's GPU, and its share of the cores where several cells would otherwise all use every one."""
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    if at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    return environment
