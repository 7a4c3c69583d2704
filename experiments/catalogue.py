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
from experiments.measured import Measurement, Protocol, model_of, perplexities
from experiments.mmlu import table_mmlu
from experiments.not_run import NotRun
from experiments.seeds import table_seeds
from experiments.sources import Sources
from experiments.table import Table


@dataclass(frozen=True)
class Selection:
    """Which records a table is drawn from; None for any. dataset, window, text (the first digits of its SHA-256) and
    protocol (of its digest) are perplexity's. explain: cells without a record say why."""

    model: str | None = None
    dataset: str | None = None
    window: int | None = None
    text: str | None = None
    explain: bool = True
    protocol: str | None = None

    def records(self, sources: Sources) -> list[dict]:
        return [each for each in sources.records if self.model in (None, model_of(each))]

    def perplexities(self, sources: Sources) -> list[Measurement]:
        found = perplexities(self.records(sources))
        return [each for each in found if each.protocol is None or self._takes(each.protocol)]

    def timed(self, sources: Sources) -> list[Timed]:
        found = timed_rows(sources.end_to_end, sources.records)
        return [each for each in found if self.model in (None, each.row["model"])]

    def not_run(self, sources: Sources) -> NotRun | None:
        return NotRun(sources) if self.explain else None

    def _takes(self, protocol: Protocol) -> bool:
        return (
            self.dataset in (None, protocol.dataset)
            and self.window in (None, protocol.window)
            and protocol.text.startswith(self.text or "")
            and protocol.digest.startswith(self.protocol or "")
        )


@dataclass(frozen=True)
class Entry:
    """help: one line. table: raises MixedProtocolsError. draw: writes the figure, for entries that have one."""

    help: str
    table: Callable[[Sources, Selection], Table]
    draw: Callable[[Sources, Path], list[Path]] | None = None


def _of_perplexities(table: Callable[..., Table]) -> Callable[[Sources, Selection], Table]:
    return lambda sources, selection: table(selection.perplexities(sources), selection.not_run(sources))


def _of_records(table: Callable[..., Table]) -> Callable[[Sources, Selection], Table]:
    return lambda sources, selection: table(selection.records(sources), selection.not_run(sources))


def _of_timed(table: Callable[..., Table], measured: Callable = list) -> Callable[[Sources, Selection], Table]:
    return lambda sources, selection: table(measured(selection.timed(sources)), selection.not_run(sources))


def _of_products(table: Callable[..., Table]) -> Callable[[Sources, Selection], Table]:
    return lambda sources, selection: table(sources.gemm, selection.not_run(sources))


CATALOGUE: dict[str, Entry] = {
    "table2_perplexity": Entry("perplexity by method and model", _of_perplexities(table2_perplexity)),
    "table2_c4": Entry("perplexity on C4 by method and model", _of_perplexities(table2_c4)),
    "table2_lambada": Entry("LAMBADA accuracy by method and model", _of_records(table2_lambada)),
    "table3_commonsense": Entry("common-sense accuracy", _of_records(table3_commonsense)),
    "table_mmlu": Entry("MMLU accuracy by method and model", _of_records(table_mmlu)),
    "accuracy_tasks": Entry(
        "every lm-eval task that was measured",
        lambda sources, selection: accuracy_tasks(selection.records(sources)),
    ),
    "table4_latency": Entry("end-to-end latency", _of_timed(table4_latency, latencies)),
    "end_to_end": Entry(
        "end-to-end latency, every batch size",
        lambda sources, selection: end_to_end_table(selection.timed(sources)),
        lambda sources, path: draw_end_to_end(path, timed_rows(sources.end_to_end, sources.records)),
    ),
    "table5_gemm": Entry("one GEMM against QUIK", _of_products(table5_gemm)),
    "table6_ablation": Entry("the recipe's steps, perplexity", _of_perplexities(table6_ablation)),
    "table_seeds": Entry(
        "perplexity over random seeds",
        lambda sources, selection: table_seeds(selection.perplexities(sources)),
    ),
    "figure1_bitwidths": Entry(
        "both stages by bit width",
        _of_timed(figure1_table),
        lambda sources, path: draw_end_to_end(path, bitwidth_rows(timed_rows(sources.end_to_end, sources.records))),
    ),
    "figure6_speedup": Entry(
        "speed-up of W4A8 over FP16",
        _of_timed(figure6_table, speedups),
        lambda sources, path: draw_figure6(
            path, speedups(timed_rows(sources.end_to_end, sources.records)), NotRun(sources)
        ),
    ),
    "figure7_gemm_kinds": Entry(
        "kinds of W4A8 GEMM",
        _of_products(figure7_table),
        lambda sources, path: draw_figure7(path, sources.gemm, NotRun(sources)),
    ),
}
