"""Every table and figure of the paper by name, each drawn from what was found.

A new measurement enters here: give its table the measurements in place of the empty default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.accuracy_tables import (
    accuracy_tasks,
    table2_c4,
    table2_lambada,
    table2_perplexity,
    table3_commonsense,
    table6_ablation,
)
from experiments.bitwidths import bitwidth_rows, figure1_table
from experiments.end_to_end import Timed, end_to_end_table, latencies, speedups, timed_rows
from experiments.figures import draw_end_to_end, draw_figure6, draw_figure7
from experiments.gemm import figure7_table
from experiments.latency_tables import figure6_table, table4_latency, table5_gemm
from experiments.measured import Measurement, Protocol, perplexities
from experiments.mmlu import table_mmlu
from experiments.sources import Sources
from experiments.table import Table


@dataclass(frozen=True)
class Selection:
    """Which records a table is drawn from; None for any. dataset, window and text (the first digits of its SHA-256) are
    perplexity's."""

    model: str | None = None
    dataset: str | None = None
    window: int | None = None
    text: str | None = None

    def records(self, sources: Sources) -> list[dict]:
        return [each for each in sources.records if self.model in (None, _model_of(each))]

    def perplexities(self, sources: Sources) -> list[Measurement]:
        found = perplexities(self.records(sources))
        return [each for each in found if each.protocol is None or self._takes(each.protocol)]

    def timed(self, sources: Sources) -> list[Timed]:
        found = timed_rows(sources.end_to_end, sources.records)
        return [each for each in found if self.model in (None, each.row["model"])]

    def _takes(self, protocol: Protocol) -> bool:
        return (
            self.dataset in (None, protocol.dataset)
            and self.window in (None, protocol.window)
            and protocol.text.startswith(self.text or "")
        )


def _model_of(record: dict) -> str:
    return record.get("model", {}).get("name") or record["config"]["model"]["name"]


@dataclass(frozen=True)
class Entry:
    """help: one line. table: raises MixedProtocolsError. draw: writes the figure, for entries that have one."""

    help: str
    table: Callable[[Sources, Selection], Table]
    draw: Callable[[Sources, Path], list[Path]] | None = None


CATALOGUE: dict[str, Entry] = {
    "table2_perplexity": Entry(
        "perplexity by method and model",
        lambda sources, selection: table2_perplexity(selection.perplexities(sources)),
    ),
    "table2_c4": Entry(
        "perplexity on C4 by method and model",
        lambda sources, selection: table2_c4(selection.perplexities(sources)),
    ),
    "table2_lambada": Entry(
        "LAMBADA accuracy by method and model",
        lambda sources, selection: table2_lambada(selection.records(sources)),
    ),
    "table3_commonsense": Entry(
        "common-sense accuracy",
        lambda sources, selection: table3_commonsense(selection.records(sources)),
    ),
    "table_mmlu": Entry(
        "MMLU accuracy by method and model",
        lambda sources, selection: table_mmlu(selection.records(sources)),
    ),
    "accuracy_tasks": Entry(
        "every lm-eval task that was measured",
        lambda sources, selection: accuracy_tasks(selection.records(sources)),
    ),
    "table4_latency": Entry(
        "end-to-end latency",
        lambda sources, selection: table4_latency(latencies(selection.timed(sources))),
    ),
    "end_to_end": Entry(
        "end-to-end latency, every batch size",
        lambda sources, selection: end_to_end_table(selection.timed(sources)),
        lambda sources, path: draw_end_to_end(path, timed_rows(sources.end_to_end, sources.records)),
    ),
    "table5_gemm": Entry("one GEMM against QUIK", lambda sources, selection: table5_gemm(sources.gemm)),
    "table6_ablation": Entry(
        "the recipe's steps, perplexity",
        lambda sources, selection: table6_ablation(selection.perplexities(sources)),
    ),
    "figure1_bitwidths": Entry(
        "both stages by bit width",
        lambda sources, selection: figure1_table(selection.timed(sources)),
        lambda sources, path: draw_end_to_end(path, bitwidth_rows(timed_rows(sources.end_to_end, sources.records))),
    ),
    "figure6_speedup": Entry(
        "speed-up of W4A8 over FP16",
        lambda sources, selection: figure6_table(speedups(selection.timed(sources))),
        lambda sources, path: draw_figure6(path, speedups(timed_rows(sources.end_to_end, sources.records))),
    ),
    "figure7_gemm_kinds": Entry(
        "kinds of W4A8 GEMM",
        lambda sources, selection: figure7_table(sources.gemm),
        lambda sources, path: draw_figure7(path, sources.gemm),
    ),
}
