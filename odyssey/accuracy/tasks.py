"""The lm-eval tasks of one cell, each saved as it finishes, so that a kill loses one task at most.

In the cell's directory:
    tasks/<task>.json             the result with the identity of what was measured; taken again when both agree
    tasks/<task>.items.json.gz    per-item results in columns, for paired comparisons between methods
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from odyssey.accuracy.items import pack_items
from odyssey.config import AccuracyConfig
from odyssey.data.task_files import TaskSource, task_source
from odyssey.errors import MissingDataError, OdysseyError, UnsupportedError
from odyssey.progress import Progress

FOLDER = "tasks"


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    group: AccuracyConfig,
    results: dict[str, dict],
    *,
    directory: Path,
    cache: Path,
    data_root: str | None,
    identity: dict,
    progress: Progress | None = None,
) -> None:
    """Evaluate `group.tasks` in order and put each result into `results` under the task's name when it is there.

    directory: the cell's. cache: for converted local files. identity: what determines the results apart from the
    task's own settings and data (model, integers, arithmetic, device); a saved result of another identity is not taken.
    Raises MissingDataError or UnsupportedError at the end, naming the tasks that could not be evaluated; the others
    have been.
    """
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    lm: HarnessModel | None = None
    failures: list[OdysseyError] = []
    for name in group.tasks:
        try:
            source = task_source(name, data_root, cache)
            key = identity | _task_identity(source, group)
            found = _saved(directory, name, key)
            if found is not None:
                results[name] = {**found, "resumed": True}
                continue
            lm = lm or HarnessModel(model, tokenizer, group.batch_size, group.batch_tokens)
            result, items = evaluate_task(
                lm, source, num_fewshot=group.num_fewshot, limit=group.limit, progress=progress
            )
        except (MissingDataError, UnsupportedError) as error:
            print(f"task {name}: {error.outcome}: {error}", flush=True)
            failures.append(error)
            continue
        result["simulated"] = group.simulate
        results[name] = _save(directory, name, key, result, items)
        print(f"task {name}: {result['metric']}={result['value']} on {result['items']} items", flush=True)
    if failures:
        raise type(failures[0])("; ".join(map(str, failures)))


def remove_saved(directory: Path) -> None:
    """Forget what was saved for a cell (force=true)."""
    for path in (directory / FOLDER).glob("*.json*"):
        path.unlink()


def _task_identity(source: TaskSource, group: AccuracyConfig) -> dict:
    return {
        "task": source.name,
        "data": source.data_sha256 or source.origin,
        "limit": group.limit,
        "num_fewshot": group.num_fewshot,
        "batch_size": group.batch_size,
        "batch_tokens": group.batch_tokens,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _saved(directory: Path, name: str, key: dict) -> dict | None:
    """A saved result of the same identity whose items are whole."""
    folder = directory / FOLDER
    try:
        saved = json.loads((folder / f"{name}.json").read_text())
        items = (directory / saved["result"]["items_file"]).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = saved["identity"] == key and hashlib.sha256(items).hexdigest() == saved["result"]["items_sha256"]
    return saved["result"] if same else None


def _save(directory: Path, name: str, key: dict, result: dict, items: dict) -> dict:
    """Write items, then the result that names them; returns the result with both."""
    packed = pack_items(name, result["prompts_sha256"], items)
    items_file = f"{FOLDER}/{name}.items.json.gz"
    result = {**result, "items_file": items_file, "items_sha256": hashlib.sha256(packed).hexdigest()}
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    _write(directory / items_file, packed)
    _write(directory / FOLDER / f"{name}.json", json.dumps({"identity": key, "result": result}, indent=1).encode())
    return result


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
