"""The paper's accuracy tables: perplexity (2), LAMBADA (2), common-sense tasks (3) and the recipe's ablation (6); and
every lm-eval task that was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from experiments import paper
from experiments.comparison import Why, comparison_table, paired_columns, paired_values
from experiments.differences import with_differences
from experiments.measured import (
    Measurement,
    Protocol,
    asked_datasets,
    single_protocol,
    task_accuracies,
    task_averages,
)
from experiments.not_run import NotRun
from experiments.paired import (
    accuracy_pair,
    average_pair,
    pair_note,
    percentage_pair,
    perplexity_pair,
    with_reference,
)
from experiments.recipes import FULL_RECIPE, RECIPE_ORDER
from experiments.style import method_name, method_rank, model_name, model_rank
from experiments.table import Column, Table

_MODEL, _METHOD, _FORMAT = Column("model", "model"), Column("method", "method"), Column("format", "format")
_PAPER_WINDOW = 2048
_PAPER_PROTOCOL = (
    "The paper's FP16 perplexity of LLaMA-7B is 5.73 where the common protocol (windows of 2048 tokens) gives 5.68, "
    "for a reason that is not known here: compare distances from FP16 rather than values."
)


# lm-eval's names. The preprocessed HellaSwag has other prompts: another task.
_COMMONSENSE_TASKS = {
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "hellaswag_preprocessed": "HellaSwag (preprocessed)",
    "arc_easy": "ARC-e",
}


def table2_perplexity(measurements: Sequence[Measurement], not_run: NotRun | None = None) -> Table:
    """Perplexity of every method with its full recipe; cells of the recipe's ablation are in table 6, C4 beside another
    data set is in table2_c4. not_run: says why cells have no record.

    Raises MixedProtocolsError.
    """
    return _perplexity_table("table2_perplexity", _without_c4(measurements), not_run)


def table2_c4(measurements: Sequence[Measurement], not_run: NotRun | None = None) -> Table:
    """Perplexity on C4 alone, of the same cells. Raises MixedProtocolsError."""
    on_c4 = [
        each
        for each in measurements
        if (each.protocol.dataset == "c4" if each.protocol else "c4" in asked_datasets(each.config))
    ]
    return _perplexity_table("table2_c4", on_c4, not_run, dataset="c4")


def _perplexity_table(
    name: str, measurements: Sequence[Measurement], not_run: NotRun | None, dataset: str | None = None
) -> Table:
    full = [each for each in measurements if each.method != "odyssey" or each.recipe == FULL_RECIPE]
    protocol, shown = _one_protocol(full)
    shown = with_reference(shown, perplexity_pair)
    papers = dataset is None and is_papers(protocol)
    title = {"c4": "C4"}.get(dataset) or _dataset_name(protocol)
    return comparison_table(
        name,
        f"Perplexity on {title} (the paper's table 2)",
        (_MODEL, _METHOD, _FORMAT),
        _with_format(paper.WIKITEXT2) if papers else {},
        with_differences(shown, lambda each: (each.model, each.method, each.format), over_seeds=True),
        labels=lambda cell: (model_name(cell[0]), method_name(cell[1]), cell[2]),
        rank=lambda cell: (*model_rank(cell[0]), method_rank(cell[1]), cell[2]),
        number="{:.3f}",
        signed="{:+.3f}",
        notes=(*_protocol_lines(protocol), *([_PAPER_PROTOCOL] if papers else ()), *pair_note(shown)),
        why=_why(not_run, "table2_perplexity"),
    )


def table6_ablation(measurements: Sequence[Measurement], not_run: NotRun | None = None) -> Table:
    """Perplexity of the recipe's steps. Raises MixedProtocolsError."""
    protocol, shown = _one_protocol(_without_c4([each for each in measurements if each.recipe is not None]))
    # FP16 has no row of its own here, but it is what every recipe is compared with.
    references = [each for each in measurements if each.method == "fp16" and each.protocol == protocol]
    shown = [each for each in with_reference([*references, *shown], perplexity_pair) if each.recipe is not None]
    reported = {}
    if is_papers(protocol):
        for (model, recipe), figure in paper.reported(paper.ABLATION).items():
            reported[model, "W4A8", recipe] = figure.value
    return comparison_table(
        "table6_ablation",
        f"Ablation of the recipe, perplexity on {_dataset_name(protocol)} (the paper's table 6)",
        (_MODEL, _FORMAT, Column("recipe", "recipe")),
        reported,
        with_differences(shown, lambda each: (each.model, each.format, each.recipe), over_seeds=True),
        labels=lambda cell: (model_name(cell[0]), cell[1], cell[2]),
        rank=lambda cell: (*model_rank(cell[0]), cell[1], RECIPE_ORDER.index(cell[2])),
        number="{:.3f}",
        signed="{:+.3f}",
        notes=(*_protocol_notes(protocol), *pair_note(shown)),
        why=not_run and (lambda cell: not_run.accuracy("table6_ablation", cell[0], "odyssey", cell[2])),
    )


def table2_lambada(records: Sequence[dict] = (), not_run: NotRun | None = None) -> Table:
    """LAMBADA accuracy in percent. Raises MixedProtocolsError."""
    measurements = with_reference(task_accuracies(records, "lambada_openai", scale=100), percentage_pair)
    protocol = single_protocol(measurements)
    reported = _with_format(paper.LAMBADA)
    return comparison_table(
        "table2_lambada",
        "LAMBADA accuracy, % (the paper's table 2)",
        (_MODEL, _METHOD, _FORMAT),
        reported,
        with_differences(measurements, lambda each: (each.model, each.method, each.format)),
        labels=lambda cell: (model_name(cell[0]), method_name(cell[1]), cell[2]),
        rank=lambda cell: (*model_rank(cell[0]), method_rank(cell[1]), cell[2]),
        notes=(*_protocol_lines(protocol), *pair_note(measurements)),
        why=_why(not_run, "table2_perplexity"),
    )


def table3_commonsense(records: Sequence[dict] = (), not_run: NotRun | None = None) -> Table:
    """Common-sense accuracy as fractions (acc_norm, where the task has it). Raises MixedProtocolsError."""
    by_task = {name: task_accuracies(records, task) for task, name in _COMMONSENSE_TASKS.items()}
    averaged = tuple(task for task, name in _COMMONSENSE_TASKS.items() if name in paper.COMMONSENSE_TASKS)
    by_task["average"] = task_averages(records, averaged)
    order = list(by_task)
    measured, notes = {}, []
    for task, single in by_task.items():
        found = with_reference(single, average_pair if task == "average" else accuracy_pair)
        notes += [note for note in pair_note(found) if note not in notes]
        protocol = single_protocol(found)
        notes += [f"Protocol of {task}: {protocol}."] if protocol else []
        cells = with_differences(found, lambda each: (each.model, each.method, each.format))
        measured |= {(*cell, task): each for cell, each in cells.items()}
    return comparison_table(
        "table3_commonsense",
        "Common-sense accuracy (the paper's table 3)",
        (_MODEL, _METHOD, _FORMAT, Column("task", "task")),
        _with_format(paper.COMMONSENSE),
        measured,
        labels=lambda cell: (model_name(cell[0]), method_name(cell[1]), cell[2], cell[3]),
        rank=lambda cell: (*model_rank(cell[0]), method_rank(cell[1]), cell[2], order.index(cell[3])),
        number="{:.4f}",
        signed="{:+.4f}",
        notes=tuple(notes),
        why=_why(not_run, "table3_commonsense"),
    )


def _why(not_run: NotRun | None, experiment: str) -> Why | None:
    """For cells that begin with a model and a method, of a prepared sweep."""
    return not_run and (lambda cell: not_run.accuracy(experiment, cell[0], cell[1]))


def accuracy_tasks(records: Sequence[dict] = ()) -> Table:
    """Every lm-eval task that was measured, MMLU and tasks beyond the paper's included; one group of rows per protocol,
    so that nothing of different prompts is compared."""
    names = sorted({task for record in records for task in record.get("accuracy", {}).get("tasks", {})})
    columns = (
        _MODEL, Column("task", "task"), _METHOD, _FORMAT, Column("items", "items", "{:d}"), Column("metric", "metric"),
        Column("measured", "measured", "{:.4f}"), Column("stderr", "stderr", "{:.4f}"), *paired_columns("{:+.4f}"),
        Column("device", "device"), Column("commit", "commit"), Column("note", "note"),
    )  # fmt: skip
    rows, found = [], []
    for task in names:
        by_protocol = defaultdict(list)
        for each in task_accuracies(records, task, limited=True):
            if each.result is not None:
                by_protocol[each.protocol].append(each)
        for group in by_protocol.values():
            found += [(task, each) for each in with_reference(group, accuracy_pair)]

    def rank(pair: tuple[str, Measurement]) -> tuple:
        task, each = pair
        place = model_rank(each.model), task, each.device, str(each.protocol)
        return (*place, method_rank(each.method), each.format)

    for task, each in sorted(found, key=rank):
        result = each.result
        limited = f"limit {result['limit']}" if result.get("limit") else None
        rows.append((
            model_name(each.model), task, method_name(each.method), each.format, result["items"], result["metric"],
            each.outcome if each.value is None else each.value, result.get("stderr"),
            *paired_values(each.paired, "{:+.4f}"), each.device, each.commit,
            ", ".join(filter(None, (limited, each.note))) or None,
        ))  # fmt: skip
    notes = pair_note([each for _, each in found])
    return Table("accuracy_tasks", "Accuracy of every lm-eval task", columns, tuple(rows), notes)


def _one_protocol(measurements: list[Measurement]) -> tuple[Protocol | None, list[Measurement]]:
    """The protocol, and what belongs into its column: its values and the cells that failed while asked for its data."""
    protocol = single_protocol(measurements)
    dataset = protocol.dataset if protocol else None
    return protocol, [
        each for each in measurements if each.value is not None or dataset in (None, *asked_datasets(each.config))
    ]


def _without_c4(measurements: Sequence[Measurement]) -> list[Measurement]:
    """All but C4 where another data set was measured, too."""
    others = [each for each in measurements if each.protocol is not None and each.protocol.dataset != "c4"]
    return [each for each in measurements if each.protocol is None or each in others] if others else list(measurements)


def _protocol_lines(protocol: Protocol | None) -> tuple[str, ...]:
    return (f"Protocol: {protocol}.",) if protocol else ()


def is_papers(protocol: Protocol | None) -> bool:
    """Whether the paper's perplexities belong beside results of this protocol: the whole text in windows of 2048."""
    return protocol is None or (protocol.dataset, protocol.window, protocol.whole) == ("wikitext2", _PAPER_WINDOW, True)


def _dataset_name(protocol: Protocol | None) -> str:
    return (
        "WikiText-2"
        if protocol is None or protocol.dataset == "wikitext2"
        else {"file": "a text file", "embedded": "the embedded text"}.get(protocol.dataset, protocol.dataset)
    )


def _with_format(quantity: str) -> dict[tuple, float]:
    """The paper's figures by (model, method, format, ...)."""
    return {
        (model, method, paper.METHOD_FORMATS[method], *rest): figure.value
        for (model, method, *rest), figure in paper.reported(quantity).items()
    }


def _protocol_notes(protocol: Protocol | None) -> tuple[str, ...]:
    return (*_protocol_lines(protocol), *([_PAPER_PROTOCOL] if is_papers(protocol) else ()))
