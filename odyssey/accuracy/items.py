"""Per-item results of a task as a small file beside the record: which items were right, what was answered."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from odyssey.errors import MissingDataError


def pack_items(task: str, prompts_sha256: str, items: dict[str, dict[str, dict]]) -> bytes:
    """Gzipped JSON of per-item results (subtask -> document id -> {"answer", metric: value}), in columns. The same
    results give the same bytes."""
    content = {
        "task": task,
        "prompts_sha256": prompts_sha256,
        "items": {name: _columns(found) for name, found in items.items()},
    }
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def _columns(items: dict[str, dict]) -> dict[str, list]:
    """{"doc": ids, key: values}, whole numbers without their ".0"."""
    keys = list(dict.fromkeys(key for item in items.values() for key in item))
    return {"doc": list(items), **{key: [_short(item.get(key)) for item in items.values()] for key in keys}}


def _short(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_items(directory: Path, result: dict) -> dict[str, dict[str, dict]]:
    """Per-item results of a task: subtask -> document id -> {"answer": what was chosen, metric: value}.

    directory: the cell's; result: the record's entry of the task. Raises MissingDataError when the file is gone or is
    not the one that the record names.
    """
    path = directory / result["items_file"]
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise MissingDataError(f"{path}: per-item results are gone; run the cell again with force=true") from error
    if hashlib.sha256(packed).hexdigest() != result["items_sha256"]:
        raise MissingDataError(f"{path}: not the per-item results of its record; run the cell again with force=true")
    items = {}
    for task, columns in json.loads(gzip.decompress(packed))["items"].items():
        keys = [key for key in columns if key != "doc"]
        values = zip(*(columns[key] for key in keys), strict=True)
        items[task] = {doc: dict(zip(keys, row, strict=True)) for doc, row in zip(columns["doc"], values, strict=True)}
    return items
