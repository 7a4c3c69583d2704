"""What a record says of the machine and the software that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "hydra-core",
    "lm-eval",
    "datasets",
    "tokenizers",
    "numpy",
    "triton",
)


def describe() -> dict:
    """Hardware, library versions and the project's commit; JSON-ready."""
    import odyssey

    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "odyssey": odyssey.__version__,
        "git_commit": git_commit(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def git_commit() -> str | None:
    """Commit of the source tree, with "-dirty" when tracked files differ; None outside a repository.

    $GIT_COMMIT comes first: a tree that was copied to another machine has no repository, or one that says something
    else.
    """
    if named := os.environ.get("GIT_COMMIT"):
        return named
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it was started.

    VmHWM where there is one: getrusage's figure also counts what the parent held when it forked.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        line = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], check=True, capture_output=True, text=True
        ).stdout.splitlines()[0]
        gpu.update(zip(query.replace(".", "_").split(","), (field.strip() for field in line.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        gpu["driver_version"] = None
    return gpu
