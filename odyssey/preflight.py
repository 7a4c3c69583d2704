"""Before the first hour is spent: what a cell will take, and what it would miss.

Nothing is loaded or downloaded beyond a model's config.json; the hub is asked once for each repository.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from odyssey.config import RootConfig
from odyssey.footprint import footprint
from odyssey.methods import build_method
from odyssey.preflight_inputs import Check, cached_snapshot, data_checks, model_check, model_sizes, texts
from odyssey.record import model_directory_name

_GEMM_SECONDS, _GEMM_HOST_BYTES, _GEMM_GPU_BYTES = 1800.0, 4 * 2**30, 8 * 2**30
_UNKNOWN_HOST_BYTES, _UNKNOWN_SECONDS = 16 * 2**30, 4 * 3600.0


@dataclass
class Prediction:
    """What one cell is predicted to take; gpu_bytes is 0 on CPU, known False where the model's sizes are not known."""

    label: str
    model: str
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float
    known: bool = True
    checks: list[Check] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """False when a check failed: the cell would not end ok."""
        return not any(check.ok is False for check in self.checks)


def predict(root: RootConfig) -> Prediction:
    """Memory, disk and time of one cell, without checks. A model whose sizes are not known gets round figures."""
    on_gpu = uses_gpu(root)
    if root.gemm.bench != "none":
        return Prediction("GEMM", "", _GEMM_GPU_BYTES, _GEMM_HOST_BYTES, 2**20, _GEMM_SECONDS)
    scheme = build_method(root.method.name, root.method).scheme
    label, name = f"{root.method.name} {scheme.label}", model_directory_name(root)
    sizes = model_sizes(root.model)
    if sizes is None:
        return Prediction(label, name, 0, _UNKNOWN_HOST_BYTES, 0, _UNKNOWN_SECONDS, known=False)
    cores = _cores()
    free = psutil.virtual_memory().available
    found = footprint(root, sizes, scheme, texts=texts(root), on_gpu=on_gpu, cores=cores, free_bytes=free)
    disk, model = found.disk_bytes, root.model
    downloads = model.path is None and model.name != "tiny" and not root.latency.dummy_weights
    if downloads and cached_snapshot(model) is None:
        disk += sizes.checkpoint_bytes
    return Prediction(label, name, found.gpu_bytes, found.host_bytes, disk, found.seconds)


def preflight(root: RootConfig, runs_here: bool = True) -> Prediction:
    """The prediction with its checks. runs_here: the cell runs on this machine, whose memory, GPU and kernels count."""
    prediction = predict(root)
    if root.gemm.bench == "none":
        prediction.checks += [model_check(root), *data_checks(root)]
    prediction.checks.append(_disk_check(root, prediction))
    if runs_here:
        prediction.checks += [_host_check(prediction), *_gpu_checks(root, prediction)]
    return prediction


def _cores() -> int:
    # OpenMP takes a number for each level of nesting; the first is the one that counts here.
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(named) if named.isdigit() and int(named) else len(os.sched_getaffinity(0))


def uses_gpu(root: RootConfig) -> bool:
    """Whether the cell computes on a GPU. device=auto: when this machine has one."""
    return root.device == "cuda" or (root.device == "auto" and bool(_gpus()))


def _disk_check(root: RootConfig, prediction: Prediction) -> Check:
    directory = Path(root.output_dir).absolute()
    while not os.path.exists(directory):
        directory = directory.parent
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK):
        return Check("disk", False, f"output_dir={root.output_dir}: cannot be written")
    free = shutil.disk_usage(directory).free
    return Check("disk", free > prediction.disk_bytes, f"{free / 2**30:.0f} GiB free")


def _host_check(prediction: Prediction) -> Check:
    free = psutil.virtual_memory().available
    return Check("host memory", free > prediction.host_bytes, f"{free / 2**30:.0f} GiB free")


@functools.cache
def _gpus() -> tuple[dict, ...]:
    """Name and total bytes of the GPUs of this machine, without a CUDA context."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    try:
        listed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
        rows = [line.split(",") for line in listed.splitlines() if line.strip()]
        return tuple(
            {"name": name.strip(), "bytes": int(mib) * 2**20, "capability": float(capability)}
            for name, mib, capability in rows
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _gpu_checks(root: RootConfig, prediction: Prediction) -> list[Check]:
    published = root.latency.dummy_weights and root.model.path is None and root.model.name != "tiny"
    # The cell refuses random weights of a published model on a CPU that nobody asked for.
    needs = root.gemm.bench != "none" or root.device == "cuda" or (published and root.device == "auto")
    if not _gpus():
        # Single products are timed by GPU kernels alone.
        instead = "another machine" if root.gemm.bench != "none" else "device=cpu or another machine"
        return [Check("GPU", False, f"none on this machine; use {instead}")] if needs else []
    if not (needs or uses_gpu(root)):
        return []
    gpu = min(_gpus(), key=lambda each: each["bytes"])
    fits = prediction.gpu_bytes < gpu["bytes"]
    checks = [Check("GPU", fits, f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB")]
    if root.gemm.bench != "none" or build_method(root.method.name, root.method).scheme.activation_bits == 8:
        checks.append(_kernel_check(gpu["capability"]))
    return checks


def _kernel_check(capability: float) -> Check:
    from fastgemm.build import LIBRARY_NAME, CompilerNotFoundError, cache_dir, find_nvcc

    if capability < 8:
        return Check("kernels", False, f"FastGEMM needs compute capability 8.0, this GPU has {capability}")
    named = os.environ.get("FASTGEMM_LIBRARY")
    if named:
        found = Path(named).is_file()
        return Check("kernels", found, "FASTGEMM_LIBRARY" if found else f"FASTGEMM_LIBRARY={named}: no such file")
    try:
        find_nvcc()
    except CompilerNotFoundError as error:
        built = any(cache_dir().glob(f"*/{LIBRARY_NAME}"))
        return Check("kernels", built, "built before" if built else str(error))
    return Check("kernels", True, "compiled at first use")
