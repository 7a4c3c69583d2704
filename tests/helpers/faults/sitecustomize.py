"""Faults inside the processes of cells: on PYTHONPATH, Python imports this module before anything else.

ODYSSEY_TEST_FAULTS="gptq=oom,awq=kill,rtn=hang,odyssey=hog": by method, what befalls its cell once its first block is
written (fp16 and finished checkpoints: at once). A cell is struck once: one that is tried again is left alone.
    oom    no further memory is given to the process (RLIMIT_AS)
    kill   SIGKILL
    hang   the process stops where it is (SIGSTOP)
    hog    it takes memory until somebody kills it, 6 GB at most
"""

import os
import sys
import threading
import time
from pathlib import Path

_HOG_STEP, _HOG_LIMIT = 100_000_000, 6_000_000_000


def _cell() -> Path | None:
    """The directory of the cell that this process is, None for any other process."""
    arguments = sys.orig_argv
    if "odyssey.cell" not in arguments:
        return None
    return Path(arguments[arguments.index("odyssey.cell") + 2]).parent


def _wait_for_first_block(directory: Path, method: str) -> None:
    while method != "fp16" and not list(directory.parent.glob(f"checkpoints/{method}-*/block-00000.safetensors")):
        time.sleep(0.02)


def _oom() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


def _kill() -> None:
    os.kill(os.getpid(), 9)


def _hang() -> None:
    os.kill(os.getpid(), 19)


def _hog() -> None:
    taken = []
    while len(taken) * _HOG_STEP < _HOG_LIMIT:
        taken.append(bytearray(b"x") * _HOG_STEP)
        time.sleep(0.05)
    time.sleep(3600)


def _strike(directory: Path, method: str, fault: str) -> None:
    _wait_for_first_block(directory, method)
    {"oom": _oom, "kill": _kill, "hang": _hang, "hog": _hog}[fault]()


directory = _cell()
if directory is not None:
    method = directory.name.rpartition("-")[0]
    faults = dict(entry.split("=") for entry in os.environ.get("ODYSSEY_TEST_FAULTS", "").split(",") if entry)
    marker = directory / f".fault-{faults.get(method)}"
    if method in faults and not marker.exists():
        marker.touch()
        threading.Thread(target=_strike, args=(directory, method, faults[method]), daemon=True).start()
