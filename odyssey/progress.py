"""Progress of long work: a bar with an ETA in a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LOG_INTERVAL_S = 15.0


def _terminal():
    """Where bars go: standard output, or for a child whose output is logged, the terminal its parent writes to."""
    if sys.stdout.isatty():
        return sys.stdout
    if os.environ.get("ODYSSEY_PROGRESS") == "terminal":
        try:
            return open("/dev/tty", "w")
        except OSError:
            return None
    return None


class Task:
    """One piece of long work with a known number of steps."""

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""

    def report(self, text: str) -> None:
        """Show a short status beside the bar."""


class _BarTask(Task):
    def __init__(self, bar: RichProgress, task_id) -> None:
        self._bar, self._id = bar, task_id

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._id, steps)

    def report(self, text: str) -> None:
        self._bar.update(self._id, status=text)


class _LogTask(Task):
    """Prints at most every _LOG_INTERVAL_S seconds, so that a log of a day-long run stays readable."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = self._printed = time.monotonic()
        self._status = ""

    def _print(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._printed < _LOG_INTERVAL_S:
            return
        self._printed = now
        elapsed = now - self._started
        eta = f", ETA {elapsed / self._done * (self._total - self._done):.0f} s" if self._done else ""
        print(
            f"{self._title}: {self._done}/{self._total} after {elapsed:.0f} s{eta} {self._status}".rstrip(), flush=True
        )

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._print(force=self._done == self._total)

    def report(self, text: str) -> None:
        self._status = text
        self._print()


class Progress:
    """Makes tasks. `Progress()` draws bars when standard output is a terminal and prints lines otherwise."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    @classmethod
    def silent(cls) -> Progress:
        return cls(enabled=False)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task of `total` steps; the bar is gone when the block ends."""
        if not self._enabled:
            yield Task()
        elif (terminal := _terminal()) is not None:
            with RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(file=terminal),
                transient=True,
            ) as bar:
                yield _BarTask(bar, bar.add_task(title, total=total, status=""))
        else:
            yield _LogTask(title, total)
