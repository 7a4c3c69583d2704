"""Compares every measurement with FP16 on the same items, where the record's items are beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.measured import Measurement
from odyssey.accuracy.items import read_items
from odyssey.accuracy.statistics import PairedComparison, compare_accuracy, compare_average, compare_perplexity
from odyssey.errors import MissingDataError

REFERENCE = "fp16"
NOTE = (
    "vs FP16: difference from FP16 of the same checkpoint, items and device, with its 95 % bootstrap interval over "
    "items (perplexity: windows); within: inside the noise, as the interval holds 0 or McNemar's exact test has p of "
    "0.05 or more; flips: share of items whose answer changed."
)


def with_reference(
    measurements: Sequence[Measurement], compare: Callable[[Measurement, Measurement], PairedComparison | None]
) -> list[Measurement]:
    """Measurements with `paired` set where FP16 was measured on the same checkpoint, protocol and device.

    compare: one of the functions below. Of several FP16 records the latest one counts.
    """
    references = {_cell(each): each for each in measurements if each.method == REFERENCE and each.value is not None}
    paired = []
    for each in measurements:
        reference = references.get(_cell(each)) if each.value is not None and each.method != REFERENCE else None
        paired.append(replace(each, paired=compare(reference, each)) if reference else each)
    return paired


def pair_note(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """What the columns of a comparison mean, for a table that has one."""
    return (NOTE,) if any(each.paired is not None for each in measurements) else ()


def _cell(measurement: Measurement) -> tuple:
    checkpoint = (measurement.config or {}).get("checkpoint")
    return measurement.model, checkpoint, measurement.protocol, measurement.tokens, measurement.device


def perplexity_pair(reference: Measurement, method: Measurement) -> PairedComparison | None:
    """None for a record that does not keep its windows."""
    before, after = reference.result.get("nll"), method.result.get("nll")
    return compare_perplexity(before, after) if before and after else None


def accuracy_pair(reference: Measurement, method: Measurement) -> PairedComparison | None:
    """None where per-item results are gone, or where the task's metric is no right or wrong."""
    try:
        return compare_accuracy(*(_items(each, each.result) for each in (reference, method)), method.result["metric"])
    except (MissingDataError, KeyError, ValueError):
        return None


def percentage_pair(reference: Measurement, method: Measurement) -> PairedComparison | None:
    """accuracy_pair in percent."""
    found = accuracy_pair(reference, method)
    return found and found.scaled(100)


def average_pair(reference: Measurement, method: Measurement) -> PairedComparison | None:
    """Of measured.task_averages."""
    try:
        items = [[_items(each, result) for result in each.result.values()] for each in (reference, method)]
        return compare_average(*items, [result["metric"] for result in method.result.values()])
    except (MissingDataError, KeyError, ValueError):
        return None


def _items(measurement: Measurement, result: dict) -> dict:
    """Raises KeyError for a record that came without its place or names no items."""
    if measurement.path is None:
        raise KeyError("path")
    return read_items(Path(measurement.path).parent, result)
