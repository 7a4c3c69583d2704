"""Turns times into rows, prints them, writes them as JSON."""

import json
import os
from pathlib import Path

from .competitors import BASELINE, Kernel
from .device import stated_tops
from .timing import Timing

# 2: "grouped" and "asymmetric" are the device's best kernels; they were those of mma.sync.
FORMAT = 2


def moved_bytes(kernel: Kernel, n: int, k: int, m: int) -> float:
    """Fewest bytes a kernel must move: weight, scales and activations once, a two-byte output once.

    The int32 output of a kernel that leaves the scaling to others is not held against it here.
    """
    return n * k * kernel.stored_bits / 8 + n * 4 + m * k * kernel.activation_bytes + m * n * 2


def limit_us(kernel: Kernel, n: int, k: int, m: int, bandwidth: float, gpu: str) -> float:
    """Shortest possible time: the bytes at the measured bandwidth, or the operations at the stated rate."""
    times = [moved_bytes(kernel, n, k, m) / bandwidth]
    tops = stated_tops(gpu, kernel.math)
    if tops is not None:
        times.append(2 * m * n * k / (tops * 1e12))
    return max(times) * 1e6


def make_row(
    kernel: Kernel, n: int, k: int, m: int, timing: Timing, error: float, bandwidth: float, gpu: str
) -> dict[str, object]:
    """One row of the result; `time_us` is the median."""
    seconds = timing.median_us * 1e-6
    limit = limit_us(kernel, n, k, m, bandwidth, gpu)
    return {
        "n": n,
        "k": k,
        "m": m,
        "kernel": kernel.name,
        "time_us": timing.median_us,
        "min_us": min(timing.samples_us),
        "spread": timing.spread,
        "gb_per_s": moved_bytes(kernel, n, k, m) / seconds / 1e9,
        "tops": 2 * m * n * k / seconds / 1e12,
        "limit_us": limit,
        "share_of_limit": limit / timing.median_us,
        "relative_error": error,
        "correct": bool(error <= kernel.tolerance),
        "note": kernel.note,
        "launches_per_sample": timing.launches,
        "weight_copies": timing.copies,
        "samples_us": [round(t, 4) for t in timing.samples_us],
    }


def add_speedups(rows: list[dict]) -> None:
    """Add `speedup_over_fp16`, the time of the fp16 baseline of the same size over a row's own (None without it)."""
    baseline = {(r["n"], r["k"], r["m"]): r["time_us"] for r in rows if r["kernel"] == BASELINE and "time_us" in r}
    for row in rows:
        base = baseline.get((row["n"], row["k"], row["m"]))
        row["speedup_over_fp16"] = base / row["time_us"] if base and "time_us" in row else None


_COLUMNS = (
    f"{'N x K':>14} {'M':>6} {'kernel':<14} {'us':>9} {'spread':>7} {'GB/s':>6} {'TOP/s':>6} "
    f"{'of limit':>8} {'vs fp16':>8} {'error':>8}"
)


def header() -> str:
    """Head of the printed table."""
    return _COLUMNS


def format_row(row: dict) -> str:
    """One line of the printed table."""
    begin = f"{row['n']:>7}x{row['k']:<6} {row['m']:>6} {row['kernel']:<14}"
    if "time_us" not in row:
        return f"{begin} {row['unavailable']}"
    speedup = row.get("speedup_over_fp16")
    line = (
        f"{begin} {row['time_us']:>9.2f} {row['spread']:>7.1%} {row['gb_per_s']:>6.0f} {row['tops']:>6.0f} "
        f"{row['share_of_limit']:>8.1%} {'' if speedup is None else format(speedup, '.2f') + 'x':>8} "
        f"{row['relative_error']:>8.1e}"
    )
    if row.get("plan"):
        line += f"  {row['plan']}"
    return line if row["correct"] else line + "  WRONG"


def write_json(path: Path, environment: dict, settings: dict, rows: list[dict]) -> None:
    """Write the whole result; the file appears complete or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "environment": environment, "settings": settings, "rows": rows}
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)
