"""Accuracy: the model as it is measured, its perplexities and lm-eval tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from odyssey.config import dataset_of
from odyssey.errors import OdysseyError

if TYPE_CHECKING:
    from odyssey.cell import Cell


def load_measured(cell: Cell, checkpoint: Path | None):
    """The model as it is measured: the checkpoint with integer products or fake quantization, the source for None."""
    from odyssey.models.load import load_model
    from odyssey.quantization.checkpoint import load_quantized

    if checkpoint is None:
        model = load_model(cell.source, cell.device)
        arithmetic = "floating point"
    else:
        backend = "simulate" if cell.config.accuracy.simulate else "integer"
        model = load_quantized(checkpoint, cell.device, backend=backend)
        scheme = cell.record["method"]["scheme"]
        if backend == "simulate":
            arithmetic = "simulated"
        elif scheme["activation_bits"] == 8 and scheme["symmetric"]:
            arithmetic = "integer"
        else:
            arithmetic = "dequantized weights"
    cell.record["model"]["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    cell.record["method"]["arithmetic"] = arithmetic
    return model


def measure_perplexity(cell: Cell, model) -> None:
    """Perplexity on every data set; those that are missing are named together when the others are measured."""
    from odyssey.accuracy.perplexity import perplexity
    from odyssey.data.texts import load_corpus

    group = cell.config.accuracy.perplexity
    first = dataset_of(group, cell.config.model, default="wikitext2")
    results = cell.record.setdefault("accuracy", {}).setdefault("perplexity", {})
    failures: list[OdysseyError] = []
    for dataset in (first, *group.also):
        try:
            path = group.path if dataset == first else None
            corpus = load_corpus(dataset, "test", path=path, root=cell.config.data.root)
            result = perplexity(
                model, cell.tokenizer, corpus,
                window=cell.clip_length("accuracy.perplexity.window", group.window),
                max_windows=group.max_windows, seed=group.seed, progress=cell.progress,
            )  # fmt: skip
        except OdysseyError as error:
            failures.append(error)
        else:
            results[dataset] = {**result, "simulated": cell.config.accuracy.simulate}
    if failures:
        raise type(failures[0])("; ".join(map(str, failures)))


def measure_tasks(cell: Cell, model) -> None:
    """lm-eval's tasks; what was finished before is taken from the cell's directory."""
    from odyssey.accuracy.tasks import evaluate_tasks, remove_saved

    config = cell.config
    if config.force:
        remove_saved(cell.directory)
    identity = {
        "model": cell.source.fingerprint,
        "checkpoint": cell.record.get("quantization", {}).get("job"),
        "arithmetic": cell.record["method"]["arithmetic"],
        "dtype": cell.record["model"]["dtype"],
        "device": str(cell.device),
    }
    evaluate_tasks(
        model, cell.tokenizer, config.accuracy, cell.record.setdefault("accuracy", {}).setdefault("tasks", {}),
        directory=cell.directory, cache=Path(config.output_dir) / "cache" / "tasks", data_root=config.data.root,
        identity=identity, progress=cell.progress,
    )  # fmt: skip
