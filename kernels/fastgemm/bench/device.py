"""What the GPU is and how it is doing: names, stated peaks, clocks, power, versions."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

# Dense tensor-core rates stated by NVIDIA's data sheets, in 10^12 operations per second: (int8, fp16).
STATED_TOPS = {
    "H100 PCIe": (1513, 756),
    "H100 NVL": (1671, 835),
    "H100": (1979, 989),
    "H200 NVL": (1671, 835),
    "H200": (1979, 989),
    "A100": (624, 312),
    "A10G": (140, 70),
    "A10": (250, 125),
    "A40": (299, 150),
    "L40S": (733, 362),
    "L40": (362, 181),
    "L4": (242, 121),
    "RTX 4090": (661, 330),
    "RTX 3090": (284, 142),
    "RTX A6000": (310, 155),
}


def stated_tops(name: str, math: str) -> float | None:
    """Stated dense rate of a GPU by its name, in 10^12 operations per second; None where it is not known."""
    for part, (int8, fp16) in STATED_TOPS.items():
        if re.search(rf"\b{part}\b", name):  # whole words: an "RTX A4000" is no A40
            return float(int8 if math == "int8" else fp16)
    return None


class Monitor:
    """Samples clocks, power and temperature through NVML; silent where that is not installed."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self._nvml = self._handle = None
        with contextlib.suppress(Exception):  # any failure of NVML only means that there are no such figures
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml

    def sample(self) -> None:
        """Take one sample."""
        if self._nvml is None:
            return
        nvml, handle = self._nvml, self._handle
        with contextlib.suppress(nvml.NVMLError):
            self.samples.append(
                {
                    "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                    "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                    "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                    "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                }
            )

    def take(self) -> dict[str, dict[str, float]]:
        """Minimum, mean and maximum of each figure since the last call; empty without NVML."""
        samples, self.samples = self.samples, []
        if not samples:
            return {}
        columns = {key: [s[key] for s in samples] for key in samples[0]}
        return {k: {"min": min(v), "mean": sum(v) / len(v), "max": max(v)} for k, v in columns.items()}

    def energy_joules(self) -> float | None:
        """Energy the GPU has used since its driver was loaded; None where NVML does not say."""
        if self._nvml is None:
            return None
        with contextlib.suppress(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        return None

    def driver(self) -> dict[str, object]:
        """Driver version, power limit and top clocks; empty without NVML."""
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        facts: dict[str, object] = {}
        with contextlib.suppress(nvml.NVMLError):
            facts["driver"] = nvml.nvmlSystemGetDriverVersion()
            facts["power_limit_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
            facts["max_sm_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            facts["max_memory_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        return facts


def git_commit() -> str:
    """`$GIT_COMMIT`, else the commit of the checkout this file lies in, with "-dirty" behind it if the package differs.

    The variable comes first: a tree that was copied to a GPU host has no repository, or one that says something else.
    "unknown" where there is neither.
    """
    if named := os.environ.get("GIT_COMMIT"):
        return named
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment(monitor: Monitor) -> dict[str, object]:
    """Everything a reader needs to reproduce the figures."""
    from ..build import source_hash
    from ..library import load

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **monitor.driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "fastgemm_library": Path(load().path).parent.name,
        "fastgemm_sources": source_hash(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
