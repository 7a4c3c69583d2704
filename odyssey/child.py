"""The process that runs a cell: started in a group of its own, its output logged, stopped when it takes too long."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from odyssey.outcomes import INTERRUPTED, TIMEOUT

# Lines of a cell's log that a user sees while it runs.
_SHOWN = (b"quantizing", b"perplexity", b"latency", b"lm-eval", b"task ")
# The process that started a cell, which reads it here.
_PARENT = "ODYSSEY_PARENT_PID"
_running: set[ChildProcess] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class ChildProcess:
    """One child. `stopped`: why it was killed by us (timeout, interrupted), None when it ended by itself."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, label: str = "") -> None:
        """label: in front of the lines that are shown, where several children run at a time."""
        self._command, self._environment, self._log, self._label = command, environment, log, label
        self._process: subprocess.Popen | None = None
        self._kill_lock = threading.Lock()
        self.stopped: str | None = None

    def run(self, timeout_s: float | None) -> int:
        """Run to the end; returns the exit code, negative for a signal. Whatever interrupts this kills the child."""
        with _lock:
            _running.add(self)
        timer = threading.Timer(timeout_s, self.stop, (TIMEOUT,)) if timeout_s else None
        try:
            if _stopping.is_set():
                self.stopped = INTERRUPTED
                return -signal.SIGKILL
            with self._log.open("wb") as log:
                # A process group of its own: Ctrl-C and a batch system's signals reach the parent, which decides.
                self._process = subprocess.Popen(
                    self._command, env={**self._environment, _PARENT: str(os.getpid())}, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
                )  # fmt: skip
                if timer is not None:
                    timer.daemon = True
                    timer.start()
                if _stopping.is_set():
                    self.stop(INTERRUPTED)
                for line in self._process.stdout:
                    log.write(line)
                    log.flush()
                    if line.startswith(_SHOWN):
                        print(f"  {self._label}{line.decode(errors='replace').rstrip()}", flush=True)
            return self._process.wait()
        except BaseException:
            self.stop(INTERRUPTED)
            if self._process is not None:
                self._process.wait()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            with _lock:
                _running.discard(self)

    def stop(self, why: str) -> None:
        """Kill the child and all that it started; the first reason stays."""
        with self._kill_lock:
            if self._process is None or self._process.poll() is not None:
                return
            self.stopped = self.stopped or why
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def stop_all() -> None:
    """Kill every child of this process and start no other: they end as interrupted."""
    _stopping.set()
    with _lock:
        children = list(_running)
    for child in children:
        child.stop(INTERRUPTED)


def die_with_parent() -> None:
    """Called in the child: a parent that is killed takes it along, instead of leaving a GPU occupied."""
    if sys.platform != "linux":
        return
    import ctypes

    parent_death_signal = 1
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL, 0, 0, 0)
    # The signal is of deaths from now on; a parent that was killed before is no longer the parent.
    if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)
