"""MMLU accuracy of every method: a table that the paper's appendix has, whose figures were not available."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.comparison import comparison_table
from experiments.differences import with_differences
from experiments.measured import single_protocol, task_accuracies
from experiments.not_run import NotRun
from experiments.paired import pair_note, percentage_pair, with_reference
from experiments.paper import METHOD_FORMATS, MODEL_NAMES
from experiments.style import method_name, method_rank, model_name, model_rank
from experiments.table import Column, Table

TASK = "mmlu"


def table_mmlu(records: Sequence[dict] = (), not_run: NotRun | None = None) -> Table:
    """Accuracy in percent, 5-shot, of all questions of the 57 subjects. Raises MixedProtocolsError."""
    measurements = with_reference(task_accuracies(records, TASK, scale=100), percentage_pair)
    protocol = single_protocol(measurements)
    measured = with_differences(measurements, lambda each: (each.model, each.method, each.format))
    # The cells of the paper's models have their place before they are measured.
    for model in MODEL_NAMES:
        for method, form in METHOD_FORMATS.items():
            measured.setdefault((model, method, form), [])
    return comparison_table(
        "table_mmlu",
        "MMLU accuracy, %",
        (Column("model", "model"), Column("method", "method"), Column("format", "format")),
        {},
        measured,
        labels=lambda cell: (model_name(cell[0]), method_name(cell[1]), cell[2]),
        rank=lambda cell: (*model_rank(cell[0]), method_rank(cell[1]), cell[2]),
        notes=(*((f"Protocol: {protocol}.",) if protocol else ()), *pair_note(measurements)),
        why=not_run and (lambda cell: not_run.accuracy("table_mmlu", cell[0], cell[1])),
    )
