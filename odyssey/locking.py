"""A directory held by one process at a time, also across the hosts of a shared file system."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory`; another that wants it waits, having said so. what: what the holder does, e.g. "writing it".

    The lock goes with the process, however that ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory.name}: another process is {what}, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
