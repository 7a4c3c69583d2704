"""Local task files with the official number of rows, and the hub's data sets in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def small_root(tmp_path) -> Path:
    """data.root with made-up LAMBADA and PIQA files of the official size."""
    root = tmp_path / "data"
    _write_lines(root / "lambada/lambada_test.jsonl", ({"text": f"Box {n} holds {n % 7} jugs"} for n in range(5153)))
    goals = ({"goal": f"Count to {n}.", "sol1": f"Say {n}.", "sol2": f"Say {n + 1}."} for n in range(1838))
    _write_lines(root / "piqa/valid.jsonl", goals)
    (root / "piqa/valid-labels.lst").write_text("".join(f"{n % 2}\n" for n in range(1838)))
    return root


def _write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def hub(monkeypatch, evaluation_data):
    """datasets.load_dataset answers for the hub's data sets, in their shapes, without a network."""
    import datasets

    data, load_dataset = evaluation_data / "data", datasets.load_dataset

    def piqa():
        labels = (data / "piqa/valid-labels.lst").read_text().split()
        rows = _rows(data / "piqa/valid.jsonl")
        return {"validation": [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]}

    def mmlu(name):
        return {
            split: [row for row in _rows(data / f"mmlu/mmlu_{split}.jsonl") if row["subject"] == name]
            for split in ("dev", "test")
        }

    def load(path, name=None, **arguments):
        if path == "json":
            return load_dataset(path, name, **arguments)
        splits = {
            "EleutherAI/lambada_openai": lambda: {"test": _rows(data / "lambada/lambada_test.jsonl")},
            "baber/piqa": piqa,
            "allenai/winogrande": lambda: {"validation": _rows(data / "winogrande/winogrande_xl_validation.jsonl")},
            "allenai/ai2_arc": lambda: {"test": _rows(data / "arc/ARC-Easy_test.jsonl")},
            "cais/mmlu": lambda: mmlu(name),
        }[path]()
        # lm-eval constructs the few-shot pool of a task even for zero-shot evaluation.
        evaluated = next(iter(splits.values()))
        unused = {split: evaluated[:3] for split in ("train", "validation") if split not in splits}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in (splits | unused).items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def no_hub(monkeypatch):
    """The hub does not answer; local JSON files are read as ever."""
    import datasets

    load_dataset = datasets.load_dataset

    def load(path, name=None, **arguments):
        if path == "json":
            return load_dataset(path, name, **arguments)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
