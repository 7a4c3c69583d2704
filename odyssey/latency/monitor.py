"""What the GPU does during a measurement: energy, clocks, power, throttling, and who else uses it. Through NVML.

Without NVML (package nvidia-ml-py) or without a GPU every figure is None and `problem` says why.
"""

from __future__ import annotations

import os
import statistics

import torch

# Bits of NVML's clocks event reasons, by the names that nvidia-smi gives them.
_REASONS = {
    0x02: "applications_clocks_setting",
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
# A GPU that is this busy before a measurement is someone else's.
_BUSY_PERCENT = 5


class GpuMonitor:
    """Samples of one GPU. problem: None, or why there are no figures."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[dict] = []
        self._nvml = self._handle = None
        self.problem: str | None = None
        if device.type != "cuda":
            self.problem = "no GPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml
        except ImportError:
            self.problem = "nvidia-ml-py is not installed"
        except Exception as error:  # any failure of NVML only means that there are no such figures
            self.problem = f"NVML: {error}"

    def _read(self, function: str, *arguments):
        """One NVML figure; None where this GPU or driver does not give it."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def idle_state(self) -> dict:
        """Before anything runs: utilization, other processes, and whether the GPU counts as busy (None: unknown)."""
        use = self._read("nvmlDeviceGetUtilizationRates")
        processes = self._read("nvmlDeviceGetComputeRunningProcesses")
        others = None if processes is None else sum(process.pid != os.getpid() for process in processes)
        busy = None if use is None and others is None else bool(others or (use is not None and use.gpu > _BUSY_PERCENT))
        return {
            "busy": busy,
            "utilization_percent": None if use is None else use.gpu,
            "other_processes": others,
            "problem": self.problem,
        }

    def energy_j(self) -> float | None:
        """Joules that the GPU has used since its driver was loaded."""
        energy = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if energy is None else energy / 1e3

    def sample(self) -> None:
        """One sample of clocks, power, temperature and throttling; call it while the GPU works."""
        if self._nvml is None:
            return
        reasons = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        power = self._read("nvmlDeviceGetPowerUsage")
        self._samples.append(
            {
                "sm_mhz": self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
                "memory_mhz": self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
                "power_w": None if power is None else power / 1e3,
                "temperature_c": self._read("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
                "reasons": reasons,
            }
        )

    def take(self) -> dict:
        """Minimum, mean and maximum of every figure since the last call, and the reasons for throttling that were seen
        ("throttled" counts the samples that had one)."""
        samples, self._samples = self._samples, []
        report: dict = {"samples": len(samples), "problem": self.problem}
        for key in ("sm_mhz", "memory_mhz", "power_w", "temperature_c"):
            values = [sample[key] for sample in samples if sample[key] is not None]
            report[key] = {"min": min(values), "mean": statistics.fmean(values), "max": max(values)} if values else None
        masks = [sample["reasons"] for sample in samples if sample["reasons"] is not None]
        names = {name for mask in masks for bit, name in _REASONS.items() if mask & bit}
        report["throttle_reasons"] = sorted(names) if masks else None
        report["throttled"] = sum(any(mask & bit for bit in _REASONS) for mask in masks) if masks else None
        return report
