"""Statistics of latency samples."""

from __future__ import annotations

import math
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


def percentiles(samples: list[float]) -> dict:
    """Count, mean, median, 90th and 99th percentile (nearest rank) and maximum of samples in any unit; JSON-ready."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)

    def nearest(share: float) -> float:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return {
        "count": len(ordered),
        "mean": statistics.fmean(ordered),
        "p50": statistics.median(ordered),
        "p90": nearest(0.9),
        "p99": nearest(0.99),
        "max": ordered[-1],
    }
