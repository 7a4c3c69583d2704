"""The preflight of a command line as a table: what each cell is predicted to take, and what it would miss."""

from __future__ import annotations

import psutil

from experiments.table import Column, Table
from odyssey.config import RootConfig
from odyssey.preflight import Prediction, preflight

_GIB = 2**30


def print_preflight(
    cells: list[RootConfig], runs_here: bool = True, settings: list[str] | None = None, at_once: int = 1
) -> bool:
    """Print the table; returns whether every cell can end ok as far as that can be told. settings: in which each cell
    differs from the others. at_once: cells that run together on this machine."""
    predictions = [preflight(cell, runs_here) for cell in cells]
    print(preflight_table(predictions, settings).render("terminal"), flush=True)
    together = _together(predictions, at_once) if runs_here else None
    if together:
        print(together, flush=True)
    return together is None and all(prediction.can_run for prediction in predictions)


def _together(predictions: list[Prediction], at_once: int) -> str | None:
    """What is wrong with running so many at a time, None when nothing is."""
    needed = sum(sorted((each.host_bytes for each in predictions if each.known), reverse=True)[:at_once])
    free = psutil.virtual_memory().available
    if at_once == 1 or needed <= free:
        return None
    return (
        f"hydra.launcher.jobs={at_once}: the largest cells together need {needed / _GIB:.1f} GiB of host memory, "
        f"{free / _GIB:.1f} GiB are free; fewer jobs"
    )


def preflight_table(predictions: list[Prediction], settings: list[str] | None = None) -> Table:
    """One row per cell; below it what was found missing, each once with the cells that it concerns."""
    columns = (
        Column("cell", "cell", "{:d}"),
        Column("model", "model"),
        Column("method", "method"),
        Column("settings", "settings"),
        Column("gpu", "GPU GiB", "{:.1f}"),
        Column("host", "host GiB", "{:.1f}"),
        Column("disk", "disk GiB", "{:.2f}"),
        Column("time", "about"),
        Column("checks", "checks"),
    )
    settings = settings or [""] * len(predictions)
    rows = tuple(_row(number, *each) for number, each in enumerate(zip(predictions, settings, strict=True)))
    return Table("preflight", f"Preflight of {len(rows)} cells (predicted)", columns, rows, tuple(_notes(predictions)))


def _row(number: int, prediction: Prediction, settings: str) -> tuple:
    missing = [check.name for check in prediction.checks if check.ok is False]
    unsure = [f"{check.name}?" for check in prediction.checks if check.ok is None]
    figures = (None, None, None, None)
    if prediction.known:
        bytes_ = (prediction.gpu_bytes or None, prediction.host_bytes, prediction.disk_bytes)
        figures = (*(None if each is None else each / _GIB for each in bytes_), _duration(prediction.seconds))
    front = (number, prediction.model or None, prediction.label, settings or None)
    return (*front, *figures, ", ".join([*missing, *unsure]) or "ok")


def _duration(seconds: float) -> str:
    """Rough, as the prediction is: minutes, hours or days."""
    for limit, unit, size in ((5400, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{max(1, round(seconds / size))} {unit}"
    return f"{round(seconds / 86400)} d"


def _notes(predictions: list[Prediction]) -> list[str]:
    cells: dict[tuple[str, str], list[str]] = {}
    for number, prediction in enumerate(predictions):
        for check in prediction.checks:
            if not check.ok:
                cells.setdefault((check.name, check.text), []).append(str(number))
        if not prediction.known:
            unknown = f"of {prediction.model} are not known before it is read"
            cells.setdefault(("sizes", unknown), []).append(str(number))
    notes = [f"{name}: {text} (cell {', '.join(numbers)})" for (name, text), numbers in cells.items()]
    return notes or ["Nothing is missing."]
