"""What the monitor says of a GPU, from a stand-in for NVML whose figures are known."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from odyssey.latency.candidates import Run
from odyssey.latency.end_to_end import random_prompt, time_interleaved
from odyssey.latency.monitor import GpuMonitor

CPU = torch.device("cpu")
POWER_CAP, THERMAL, IDLE = 0x04, 0x20, 0x01


class Nvml:
    """NVML of a GPU whose every sample is the next of `samples`: (MHz, milliwatts or None, reasons)."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"

    class NVMLError(Exception):
        pass

    def __init__(self, samples=(), use=0, processes=()):
        self._samples, self._use, self._processes = list(samples), use, processes
        self._energy = 0

    def nvmlDeviceGetCurrentClocksEventReasons(self, _):
        self._now = self._samples.pop(0)
        return self._now[2]

    def nvmlDeviceGetPowerUsage(self, _):
        if self._now[1] is None:
            raise self.NVMLError("not supported")
        return self._now[1]

    def nvmlDeviceGetClockInfo(self, _, clock):
        return self._now[0] if clock == "sm" else 2619

    def nvmlDeviceGetTemperature(self, *_):
        return 40

    def nvmlDeviceGetTotalEnergyConsumption(self, _):
        self._energy += 1500
        return self._energy

    def nvmlDeviceGetUtilizationRates(self, _):
        return SimpleNamespace(gpu=self._use)

    def nvmlDeviceGetComputeRunningProcesses(self, _):
        return [SimpleNamespace(pid=pid) for pid in self._processes]


def _monitor(**options) -> GpuMonitor:
    monitor = GpuMonitor(CPU)
    monitor._nvml, monitor._handle, monitor.problem = Nvml(**options), "handle", None
    return monitor


def test_samples_are_reported_once_with_extremes_and_reasons():
    monitor = _monitor(samples=[(1500, 600_000, POWER_CAP), (1980, None, IDLE), (1700, 700_000, POWER_CAP | THERMAL)])
    for _ in range(3):
        monitor.sample()
    report = monitor.take()
    assert report["samples"] == 3
    assert report["sm_mhz"] == {"min": 1500, "mean": pytest.approx(1726.67, abs=0.01), "max": 1980}
    assert report["power_w"] == {"min": 600.0, "mean": 650.0, "max": 700.0}
    assert report["throttle_reasons"] == ["sw_power_cap", "sw_thermal_slowdown"]
    assert report["throttled"] == 2
    assert monitor.take()["samples"] == 0
    assert monitor.take()["sm_mhz"] is None


@pytest.mark.parametrize(
    ("use", "processes", "busy"), [(0, (), False), (5, (), False), (6, (), True), (0, (os.getpid(), 1), True)]
)
def test_a_gpu_that_someone_else_uses_is_busy(use, processes, busy):
    state = _monitor(use=use, processes=processes).idle_state()
    assert (state["busy"], state["utilization_percent"]) == (busy, use)
    assert state["other_processes"] == len(set(processes) - {os.getpid()})


def test_without_nvml_nothing_is_known_and_the_reason_is_said():
    monitor = GpuMonitor(CPU)
    monitor.sample()
    assert monitor.idle_state() == {
        "busy": None, "utilization_percent": None, "other_processes": None, "problem": "no GPU",
    }  # fmt: skip
    assert monitor.energy_j() is None
    assert monitor.take() == {
        "samples": 0, "problem": "no GPU", "sm_mhz": None, "memory_mhz": None, "power_w": None, "temperature_c": None,
        "throttle_reasons": None, "throttled": None,
    }  # fmt: skip


def test_a_rows_report_is_of_all_runs_that_count():
    """One sample in the warm-up, then three runs: power is unknown in the first of them."""

    class Candidate:
        name, facts, problem = "a", {}, None

        def run(self, prompt, output_len, monitor):
            monitor.sample()
            return Run(1.0, 2.0)

    samples = [(100, 1_000, THERMAL), (1500, None, IDLE), (1800, 600_000, POWER_CAP), (1950, 650_000, POWER_CAP)]
    monitor = _monitor(samples=samples)
    prompt = random_prompt(10, 1, 4, 0, CPU)
    (timing,) = time_interleaved([Candidate()], prompt, output_len=2, warmup=1, repeats=3, monitor=monitor)
    assert timing.energy_j == [1.5, 1.5, 1.5]
    assert timing.gpu["samples"] == 3
    assert timing.gpu["sm_mhz"] == {"min": 1500, "mean": pytest.approx(1750), "max": 1950}
    assert timing.gpu["power_w"]["min"] == 600.0
    assert timing.gpu["power_w"]["max"] == 650.0
    assert timing.gpu["throttle_reasons"] == ["sw_power_cap"]
    assert timing.gpu["throttled"] == 2
