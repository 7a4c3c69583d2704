"""Statistics of latency samples."""

from __future__ import annotations

import statistics


def summarize(samples: list[float]) -> dict:
    """Median, quartiles and extremes of samples in any unit, with the samples themselves; JSON-ready."""
    if not samples:
        raise ValueError("no samples")
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "p25": quartiles[0],
        "p75": quartiles[2],
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }
