"""Joins measurements with the paper's figures into a table: our figure, the paper's, the difference, the provenance."""

from __future__ import annotations

from collections.abc import Callable

from experiments.measured import Measurement
from experiments.not_run import Reason
from experiments.table import Column, Table
from odyssey.accuracy.statistics import PairedComparison

NOT_RUN, NOT_REPORTED = "not run", "not reported"
_NO_PAIR = (None,) * 5
LEGEND = (
    f"measured: from records, {NOT_RUN} where there is none; paper: as reported, {NOT_REPORTED} where the figure was "
    "not available; difference: measured - paper."
)

# The reasons why a cell has no record.
Why = Callable[[tuple], tuple[Reason, ...]]


def comparison_table(
    name: str,
    title: str,
    keys: tuple[Column, ...],
    paper: dict[tuple, float],
    measured: dict[tuple, list[Measurement]],
    *,
    labels: Callable[[tuple], tuple],
    rank: Callable[[tuple], tuple],
    number: str = "{:.2f}",
    signed: str = "{:+.2f}",
    notes: tuple[str, ...] = (),
    why: Why | None = None,
    differs: Callable[[tuple], bool] = lambda cell: True,
) -> Table:
    """One row per cell and measurement of it; cells are those that the paper reports or that were measured.

    keys: the columns in front; labels gives their texts for a cell, rank its place. A cell that did not end ok shows
    its outcome in place of the figure. differs: whether a cell's distance from the paper says something.
    """
    columns = (
        *keys,
        Column("measured", "measured", number, absent=NOT_RUN, explained=True),
        Column("paper", "paper", number, absent=NOT_REPORTED),
        Column("difference", "difference", signed),
        *paired_columns(signed),
        Column("device", "device"),
        Column("commit", "commit"),
        Column("note", "note"),
    )
    rows, reasons = [], []
    for cell in sorted({*paper, *measured}, key=rank):
        figure = paper.get(cell)
        if not measured.get(cell):
            rows.append((*labels(cell), None, figure, None, *_NO_PAIR, None, None, None))
            reasons.append(tuple(reason.text for reason in why(cell)) if why else ())
        for each in measured.get(cell, ()):
            difference = each.value - figure if None not in (each.value, figure) and differs(cell) else None
            shown = each.outcome if each.value is None else each.value
            compared = paired_values(each.paired, signed)
            rows.append((*labels(cell), shown, figure, difference, *compared, each.device, each.commit, each.note))
            reasons.append(())
    return Table(name, title, columns, tuple(rows), (LEGEND, *notes), tuple(reasons) if any(reasons) else ())


def paired_columns(signed: str) -> tuple[Column, ...]:
    """Columns of the comparison with FP16 on the same items; a table without one does not show them."""
    return (
        Column("vs_fp16", "vs FP16", signed),
        Column("interval", "95 % interval"),
        Column("noise", "noise"),
        Column("mcnemar_p", "McNemar p", "{:.2g}"),
        Column("flips", "flips", "{:.1%}"),
    )


def paired_values(paired: PairedComparison | None, signed: str) -> tuple:
    """The values of `paired_columns`."""
    if paired is None:
        return _NO_PAIR
    interval = f"[{signed.format(paired.low)}, {signed.format(paired.high)}]"
    noise = "within" if paired.within_noise else "outside"
    return paired.difference, interval, noise, paired.p_value, paired.flips
