"""How a cell ended, in one word and one line: from the exception inside it, or from the way its process died."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

from odyssey.errors import OdysseyError

# `failed` is an error of the program; everything else names what was missing, refused or stopped.
OOM, UNSUPPORTED, TIMEOUT, CRASH, INTERRUPTED, FAILED = (
    "oom", "unsupported", "timeout", "crash", "interrupted", "failed",
)  # fmt: skip
RESUME = "what it finished is kept, run again to go on"

_HOST_OOM = ("DefaultCPUAllocator", "Cannot allocate memory", "can't allocate memory")
_GPU_OOM = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_KERNEL = "no kernel image is available"
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_GPU_ERRORS = ("CUDA error:", "CUBLAS_STATUS_", "CUDNN_STATUS_", "CUSOLVER_STATUS_")


def of_exception(error: BaseException) -> tuple[str, str]:
    """Outcome and reason of an exception that ended a cell's work."""
    from fastgemm.build import BuildError

    line = first_line(error)
    if isinstance(error, OdysseyError):
        return error.outcome, str(error)
    if isinstance(error, BuildError):
        return UNSUPPORTED, line
    if isinstance(error, MemoryError) or any(mark in str(error) for mark in _HOST_OOM):
        return OOM, "host memory exhausted; use a smaller model, fewer calibration samples or a larger machine"
    if type(error).__name__ == "OutOfMemoryError" or any(mark in str(error) for mark in _GPU_OOM):
        return OOM, f"GPU memory exhausted: {line}"
    if isinstance(error, RuntimeError) and _NO_KERNEL in str(error):
        return UNSUPPORTED, f"this GPU is not one that the installed torch was built for: {line}"
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _GPU_ERRORS):
        return CRASH, f"the GPU stopped with {line}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Safetensors has an error of its own, with the system's words in it.
    if full or any(mark in line for mark in _DISK_FULL):
        return FAILED, f"no disk space is left ({line}); free some, or choose another output_dir; {RESUME}"
    return FAILED, f"{type(error).__name__}: {line}"


def of_exit(code: int, *, oom_killed: bool = False) -> tuple[str, str]:
    """Outcome and reason of a process that left no record. code: as subprocess has it, negative for a signal."""
    if code >= 0:
        return CRASH, f"the cell's process exited with code {code} and left no record; see its log"
    if code == -signal.SIGKILL and oom_killed:
        return OOM, f"the kernel killed the cell's process for lack of memory; {RESUME}"
    if code == -signal.SIGKILL:
        return CRASH, f"the cell's process was killed (SIGKILL), often for lack of memory; {RESUME}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return CRASH, f"the cell's process died of {name}; {RESUME}"


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory: in this control group, else on this machine."""
    for path, key in (*_control_group_counters(), (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def _control_group_counters() -> list[tuple[Path, str]]:
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root, found = Path("/sys/fs/cgroup"), []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found.append((root / path.lstrip("/") / "memory.events", "oom_kill"))
        elif "memory" in controllers.split(","):
            found.append((root / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill"))
    return found


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
