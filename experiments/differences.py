"""Several measurements of one cell: what their settings differ in, and which differ in their random seeds alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.measured import Measurement, joined_notes

# What two records of one cell may differ in without that changing the result, or that has a column of its own.
_NEUTRAL = (
    "output_dir", "device", "force", "retry", "timeout_s", "preflight", "gemm.", "tracking.", "data.", "latency.",
    "model.", "accuracy.",
)  # fmt: skip
# The draw of the calibration windows, and the order in which LWC takes them.
_SEEDS = ("seed", "calibration.seed")


def with_differences(
    measurements: list[Measurement], key: Callable[[Measurement], tuple], *, over_seeds: bool = False
) -> dict[tuple, list[Measurement]]:
    """Measurements by cell, in the order of their records. Where a cell has several, each note names the settings in
    which they differ, so that nothing is chosen silently. A cell that has a value drops its failed attempts.

    over_seeds: of measurements that differ in their seeds alone the first seed stands for all, and its note says of how
    many; `experiments.seeds` has them all.
    """
    cells = defaultdict(list)
    for measurement in measurements:
        cells[key(measurement)].append(measurement)
    for name, found in cells.items():
        found = [each for each in found if each.value is not None] or found[-1:]
        series = by_seed(found) if over_seeds else [[each] for each in found]
        shown = [runs[0] for runs in series]
        flat = [_settings(each) for each in shown]
        keys = sorted({key for settings in flat for key in settings})
        differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
        cells[name] = [
            replace(each, note=joined_notes([
                each.note,
                *(f"{key}={_shown(key, settings.get(key))}" for key in differing),
                f"seed {settings.get('seed')} of {len(runs)} (table_seeds)" if len(runs) > 1 else None,
            ]))
            for each, settings, runs in zip(shown, flat, series, strict=True)
        ]  # fmt: skip
    return dict(cells)


def by_seed(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """Measurements in groups that differ in their seeds alone, each in the order of its seeds. What has no value, or
    was measured twice with the same seeds, is a group of its own."""
    groups: dict[object, dict[tuple, Measurement]] = {}
    for number, each in enumerate(measurements):
        settings = _settings(each)
        seeds = tuple(settings.pop(key, 0) for key in _SEEDS)
        cell = each.model, each.method, each.format, each.recipe, each.device, each.protocol, each.tokens
        group = (cell, tuple(sorted((key, repr(value)) for key, value in settings.items())))
        if each.value is None or None in seeds or seeds in groups.get(group, ()):
            group = number
        groups.setdefault(group, {})[seeds] = each
    return [[runs[seeds] for seeds in sorted(runs)] for runs in groups.values()]


def _settings(measurement: Measurement) -> dict:
    """The settings that bear on the result, flat."""
    flat = _flatten(measurement.config or {})
    return {key: value for key, value in flat.items() if not key.startswith(_NEUTRAL)}


def _shown(key: str, value: object) -> object:
    """Of a file its name: where it lay says nothing to a reader."""
    return Path(str(value)).name if key.endswith("path") and value is not None else value


def _flatten(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
