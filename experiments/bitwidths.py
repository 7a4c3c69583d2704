"""The paper's figure 1: what bit widths gain in context decoding (the prefill) and in self-decoding."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.comparison import NOT_REPORTED, NOT_RUN
from experiments.end_to_end import BASELINE, INPUT_LEN, OUTPUT_LEN, Timed, turns_note, weights_note
from experiments.measured import joined_notes
from experiments.not_run import NotRun
from experiments.paper import STAGES
from experiments.style import method_name, model_name
from experiments.table import Column, Table

# One format of each bit width: the groups of W4A8 are an ablation of the kernel, not another width.
FORMATS = (BASELINE, "w8a8", "w4a16-g128", "w4a8")


def bitwidth_rows(rows: Iterable[Timed]) -> list[Timed]:
    """Rows of the bit widths in this project's engine, in the order of FORMATS within a model, GPU and batch size."""
    found = [row for row in rows if row.row["method"] in FORMATS and row.row.get("engine", "odyssey") == "odyssey"]
    groups = list(dict.fromkeys(_group(row) for row in found))
    return sorted(found, key=lambda row: (groups.index(_group(row)), FORMATS.index(row.row["method"])))


def figure1_table(rows: Iterable[Timed], not_run: NotRun | None = None) -> Table:
    """Milliseconds of both stages and the ratio to FP16 of the same run. The paper's figures were not available."""
    columns = (
        Column("model", "model"),
        Column("batch_size", "batch", "{:d}"),
        Column("stage", "stage"),
        Column("format", "format"),
        Column("measured", "measured ms", "{:.2f}", absent=NOT_RUN, explained=True),
        Column("ratio", "over FP16", "{:.2f}x"),
        Column("paper", "paper ms", "{:.0f}", absent=NOT_REPORTED),
        Column("device", "device"),
        Column("commit", "commit"),
        Column("note", "note"),
    )
    found = bitwidth_rows(rows)
    groups = dict.fromkeys(_group(each) for each in found)
    drawn = [
        _row(each, stage, found) for group in groups for stage in STAGES for each in found if _group(each) == group
    ]
    reasons = ()
    if not drawn:
        drawn = [(None, None, stage, method_name(name), *(None,) * 6) for stage in STAGES for name in FORMATS]
        found = not_run.timing(INPUT_LEN, OUTPUT_LEN, "figure1_bitwidths") if not_run else ()
        reasons = (tuple(reason.text for reason in found),) * len(drawn) if found else ()
    notes = (
        f"{INPUT_LEN} tokens in (context decoding), {OUTPUT_LEN} out (self-decoding: all tokens but the first), in one "
        "engine in which only the linear layers differ.",
    )
    title = "Bit widths by stage (the paper's figure 1)"
    return Table("figure1_bitwidths", title, columns, tuple(drawn), notes, reasons)


def _row(timed: Timed, stage: str, rows: list[Timed]) -> tuple:
    row, milliseconds = timed.row, _stage_ms(timed, stage)
    base = next((each for each in rows if _group(each) == _group(timed) and each.row["method"] == BASELINE), None)
    ratio = None
    if milliseconds and base is not None and base.run == timed.run and base.ok:
        ratio = _stage_ms(base, stage) / milliseconds
    note = joined_notes([weights_note(row), turns_note(timed, BASELINE) if ratio else None])
    shown = milliseconds if timed.ok else row["outcome"]
    return (
        model_name(row["model"]), row["batch_size"], stage, method_name(row["method"]), shown, ratio, None,
        timed.device, timed.commit, note if timed.ok else row.get("reason"),
    )  # fmt: skip


def _stage_ms(timed: Timed, stage: str) -> float | None:
    row = timed.row
    if not timed.ok:
        return None
    return row["prefill_ms"] if stage == STAGES[0] else row["total_ms"] - row["prefill_ms"]


def _group(timed: Timed) -> tuple:
    return timed.row["model"], timed.device, timed.row["batch_size"]
