"""End-to-end latency: candidates that take turns run by run in one process, and the rows that come of it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence

import torch

from odyssey.latency.candidates import Candidate, Run
from odyssey.latency.floor import Floor
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.statistics import percentiles
from odyssey.progress import Task
from odyssey.record import OK


class Timing:
    """The runs of one candidate with what the GPU did during them."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.runs: list[Run] = []
        self.energy_j: list[float | None] = []
        self.peak_bytes: int | None = None
        self.gpu: dict = {}


def random_prompt(vocab_size: int, batch_size: int, input_len: int, seed: int, device: torch.device) -> torch.Tensor:
    """int64 [batch_size, input_len], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, input_len), generator=generator).to(device)


def time_interleaved(
    candidates: Sequence[Candidate],
    prompt: torch.Tensor,
    *,
    output_len: int,
    warmup: int,
    repeats: int,
    monitor: GpuMonitor,
    task: Task | None = None,
) -> list[Timing]:
    """Every candidate once, then every candidate again: a drift of the clocks meets all of them alike."""
    timings = [Timing(candidate) for candidate in candidates]
    on_gpu = prompt.is_cuda
    for number in range(warmup + repeats):
        for timing in timings:
            if on_gpu:
                torch.cuda.synchronize(prompt.device)
                torch.cuda.reset_peak_memory_stats(prompt.device)
            monitor.take()
            before, allocated = monitor.energy_j(), torch.cuda.memory_allocated(prompt.device) if on_gpu else 0
            run = timing.candidate.run(prompt, output_len, monitor)
            after = monitor.energy_j()
            if number >= warmup:
                timing.runs.append(run)
                timing.energy_j.append(None if before is None or after is None else after - before)
                timing.gpu = _joined(timing.gpu, monitor.take())
            if on_gpu:
                transient = torch.cuda.max_memory_allocated(prompt.device) - allocated
                timing.peak_bytes = max(timing.peak_bytes or 0, transient)
            if task is not None:
                task.advance()
    return timings


def release() -> None:
    """Give memory that nothing uses back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row_of(
    timing: Timing, *, model: str, batch_size: int, input_len: int, output_len: int, floor: Floor | None
) -> dict:
    """The JSON-ready row of one candidate: medians over its runs, percentiles over its steps, raw samples.

    prefill_ms is the time to the first token (TTFT), decode_ms_per_token the mean over the later ones (TPOT), total_ms
    the whole run. floor_ms: the least total that this machine allows this format; share_of_floor: floor over median.
    """
    runs, facts = timing.runs, dict(timing.candidate.facts)
    total = statistics.median(run.total_ms for run in runs)
    per_token = [run.decode_ms_per_token(output_len) for run in runs]
    decode = None if per_token[0] is None else statistics.median(per_token)
    steps = [step for run in runs for step in run.step_ms]
    energies = [energy for energy in timing.energy_j if energy is not None]
    graph_bytes = facts.pop("graph_bytes", 0)
    peak = None
    if timing.peak_bytes is not None:
        peak = facts["weight_bytes"] + facts.get("kv_bytes", 0) + graph_bytes + timing.peak_bytes
    return {
        "model": model,
        "method": timing.candidate.name,
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "outcome": OK,
        **facts,
        "prefill_ms": statistics.median(run.prefill_ms for run in runs),
        "decode_ms_per_token": decode,
        "total_ms": total,
        "step_ms": percentiles(steps) if steps else None,
        "tokens_per_s": 1e3 * batch_size * output_len / total,
        "decode_tokens_per_s": None if decode is None else 1e3 * batch_size / decode,
        "floor_ms": None if floor is None else floor.total_ms,
        "floor": None if floor is None else floor.to_dict(),
        "share_of_floor": None if floor is None else floor.total_ms / total,
        "peak_memory_bytes": peak,
        "energy_j_per_token": sum(energies) / (len(energies) * batch_size * output_len) if energies else None,
        "gpu": timing.gpu,
        "samples": {
            "prefill_ms": [round(run.prefill_ms, 4) for run in runs],
            "total_ms": [round(run.total_ms, 4) for run in runs],
            "step_ms": [[round(step, 4) for step in run.step_ms] for run in runs],
            "energy_j": timing.energy_j,
        },
    }


def failed_row(
    method: str, outcome: str, reason: str, *, model: str, batch_size: int, input_len: int, output_len: int
) -> dict:
    """The row of a candidate that could not run, with the reason."""
    return {
        "model": model,
        "method": method,
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "outcome": outcome,
        "reason": reason,
        **dict.fromkeys(("prefill_ms", "decode_ms_per_token", "total_ms", "floor_ms")),
    }


def _joined(first: dict, second: dict) -> dict:
    """Two reports of a monitor as one."""
    if not first:
        return second
    joined = {**first, "samples": first["samples"] + second["samples"]}
    for key, value in second.items():
        mine = first.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            weights = (first["samples"], second["samples"])
            mean = (mine["mean"] * weights[0] + value["mean"] * weights[1]) / max(1, sum(weights))
            joined[key] = {"min": min(mine["min"], value["min"]), "mean": mean, "max": max(mine["max"], value["max"])}
        elif isinstance(value, dict):
            joined[key] = value
        elif key == "throttle_reasons" and value is not None:
            joined[key] = sorted({*(mine or ()), *value})
        elif key == "throttled" and value is not None:
            joined[key] = (mine or 0) + value
    return joined
