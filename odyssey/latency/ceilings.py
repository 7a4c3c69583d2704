"""What this machine can do at most, measured in the run that uses it: memory bandwidth, and matrix products in int8 and
in the model's dtype."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import fastgemm


@dataclass(frozen=True)
class Ceilings:
    """read_bytes_per_s: a sum over a buffer far larger than the caches. int8_ops_per_s, float_ops_per_s: the fastest
    square product found (2 operations for each multiply-add), which: by what."""

    read_bytes_per_s: float
    int8_ops_per_s: float
    int8_by: str
    float_ops_per_s: float

    def to_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.float16) -> Ceilings:
    """Best of several repetitions of each; less than a second on a GPU."""
    on_gpu = device.type == "cuda"
    size, buffer_bytes, repeats = (8192, 4 << 30, 10) if on_gpu else (768, 1 << 28, 5)
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(device)
        buffer_bytes = min(buffer_bytes, free // 4)
    bandwidth = _read_bandwidth(buffer_bytes, device, repeats)
    operations = 2 * size**3
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    float_rate = operations / _best(lambda: a @ b.t(), device, repeats)
    x, w = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    scale = torch.ones(size, device=device)
    packed = fastgemm.pack(torch.randint(-8, 8, (size, size), device=device, dtype=torch.int8))
    products: dict[str, Callable[[], object]] = {
        "fastgemm w8a8": lambda: fastgemm.w8a8_gemm(x, scale, w, scale, None, dtype),
        "fastgemm w4a8": lambda: fastgemm.w4a8_gemm(x, scale, packed, scale, None, dtype),
    }
    if on_gpu:
        products["torch._int_mm"] = lambda: torch._int_mm(x, w.t())
    rates = {name: operations / _best(product, device, repeats) for name, product in products.items()}
    fastest = max(rates, key=rates.get)
    return Ceilings(bandwidth, rates[fastest], fastest, float_rate)


def _read_bandwidth(size: int, device: torch.device, repeats: int) -> float:
    buffer = torch.ones(size // 4, device=device)
    return buffer.nbytes / _best(lambda: torch.sum(buffer), device, repeats)


def _best(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after two that do not count."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        return min(_seconds(work) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return min(times)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
