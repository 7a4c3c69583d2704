"""How far a perplexity moves with the random seeds: the draw of the calibration windows and the order of LWC's
steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.differences import by_seed
from experiments.measured import Measurement, single_protocol
from experiments.paired import REFERENCE, perplexity_pair, with_reference
from experiments.recipes import RECIPE_ORDER
from experiments.style import method_name, method_rank, model_name, model_rank
from experiments.table import Column, Table

_COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("format", "format"),
    Column("recipe", "recipe"),
    Column("seeds", "seeds", "{:d}"),
    Column("mean", "mean", "{:.3f}"),
    Column("deviation", "deviation", "{:.3f}"),
    Column("lowest", "lowest", "{:.3f}"),
    Column("highest", "highest", "{:.3f}"),
    Column("vs_fp16", "vs FP16", "{:+.3f}"),
    Column("above", "above 0", "{:d}"),
    Column("device", "device"),
    Column("commit", "commit"),
)
_NOTE = (
    "Cells that differ in seed and calibration.seed alone; deviation: standard deviation of a single run (n - 1); vs "
    "FP16: mean of the differences from FP16 of the same checkpoint, text and device; above 0: seeds whose difference "
    "has a 95 % bootstrap interval over windows that lies above 0."
)


def table_seeds(measurements: Sequence[Measurement]) -> Table:
    """Perplexity over seeds, of every method and recipe that was measured with several. Raises MixedProtocolsError."""
    measured = [each for each in measurements if each.value is not None and each.method != REFERENCE]
    series = [runs for runs in by_seed(measured) if len(runs) > 1]
    protocol = single_protocol([each for runs in series for each in runs])
    references = [each for each in measurements if each.method == REFERENCE and each.protocol == protocol]
    rows = [_row(runs, references) for runs in sorted(series, key=_rank)]
    notes = (_NOTE, f"Protocol: {protocol}.") if rows else ()
    return Table("table_seeds", "Perplexity over seeds", _COLUMNS, tuple(rows), notes)


def _row(runs: list[Measurement], references: list[Measurement]) -> tuple:
    values = [each.value for each in runs]
    pairs = [each.paired for each in with_reference([*references, *runs], perplexity_pair)[len(references) :]]
    paired = [pair for pair in pairs if pair is not None]
    complete = len(paired) == len(runs)
    first = runs[0]
    return (
        model_name(first.model),
        method_name(first.method),
        first.format,
        first.recipe if first.method == "odyssey" else None,
        len(runs),
        statistics.mean(values),
        statistics.stdev(values),
        min(values),
        max(values),
        statistics.mean(pair.difference for pair in paired) if complete else None,
        sum(pair.low > 0 for pair in paired) if complete else None,
        first.device,
        ", ".join(dict.fromkeys(each.commit for each in runs if each.commit)),
    )


def _rank(runs: list[Measurement]) -> tuple:
    first = runs[0]
    recipe = RECIPE_ORDER.index(first.recipe) if first.recipe else -1
    return (*model_rank(first.model), method_rank(first.method), first.format, recipe, first.device)
