"""Finds what was measured: records of run.py, results of fastgemm.bench and of odyssey.latency, in output or results
directories."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from odyssey.record import RECORD_NAME, read_record

GEMM_FORMATS = (1, 2)
# In format 1 these names meant the mma.sync kernels, the only ones there were.
_FORMAT_1_KERNELS = {"grouped": "grouped-sm80", "asymmetric": "asymmetric-sm80"}
END_TO_END_FORMAT = "odyssey-end-to-end"


class SourceError(Exception):
    """A file or directory that was named cannot be used; the message is one line."""


@dataclass
class Sources:
    """records: of cells, oldest first, each with its own path under "path". gemm: results of fastgemm.bench, likewise.
    end_to_end: results of odyssey.latency, likewise. skipped: "file: reason" for JSON files beside these that are
    something else. damaged: "file: what to do" for records that cannot be read."""

    records: list[dict] = field(default_factory=list)
    gemm: list[dict] = field(default_factory=list)
    end_to_end: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def load_sources(directories: list[Path]) -> Sources:
    """Everything under the directories, down to results/<device>/<model>/<cell>/record.json, results/<device>/gemm and
    results/<device>/end_to_end.

    A cell that is found twice, as run and as committed, counts once. Raises SourceError for a directory that is absent.
    """
    sources, seen = Sources(), set()
    for directory in directories:
        if not directory.is_dir():
            problem = "not a directory" if directory.exists() else "no such directory"
            raise SourceError(f"{directory}: {problem}; name an output directory of run.py or results")
        paths = {path for depth in range(4) for path in directory.glob("*/" * depth + RECORD_NAME)}
        for path in sorted(paths):
            record = read_record(path)
            if record is None:
                sources.damaged.append(f"{path}: not a whole record; run its cell again")
            identity = record and (record.get("digest"), record.get("started"), record.get("finished"))
            if record is not None and (None in identity or identity not in seen):
                seen.add(identity)
                sources.records.append({**record, "path": str(path)})
        for pattern in ("*.json", "gemm/*.json", "*/gemm/*.json", "gemm/*/gemm.json", "*/gemm/*/gemm.json"):
            for path in sorted(set(directory.glob(pattern)) - paths):
                _add_gemm(sources, path, seen)
        for pattern in ("end_to_end/*.json", "*/end_to_end/*.json"):
            for path in sorted(directory.glob(pattern)):
                _add_end_to_end(sources, path, seen)
    sources.records.sort(key=lambda record: record.get("started", ""))
    return sources


def cell_sources(cells: list[tuple[dict, Path]]) -> Sources:
    """What cells measured: their records and, of cells of single matrix products, the results in their directories."""
    sources, seen = Sources(), set()
    for record, directory in cells:
        sources.records.append({**record, "path": str(directory / RECORD_NAME)})
        result = record.get("gemm", {}).get("file")
        if result and (directory / result).is_file():
            _add_gemm(sources, directory / result, seen)
    return sources


def load_gemm(paths: list[Path]) -> Sources:
    """Results of fastgemm.bench by name. Raises SourceError for a file that is absent or no JSON."""
    sources, seen = Sources(), set()
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{path}: no such file; python -m fastgemm.bench --json FILE writes one")
        _add_gemm(sources, path, seen)
    return sources


def _add_end_to_end(sources: Sources, path: Path, seen: set) -> None:
    document = _read(path)
    if not isinstance(document, dict) or document.get("format") != END_TO_END_FORMAT:
        sources.skipped.append(f"{path}: not a result of odyssey.latency (format {END_TO_END_FORMAT})")
    elif path.resolve() not in seen:
        seen.add(path.resolve())
        sources.end_to_end.append({**document, "path": str(path)})


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SourceError(f"{path}: not a JSON file ({error})") from error


def _add_gemm(sources: Sources, path: Path, seen: set) -> None:
    document = _read(path)
    if isinstance(document, dict) and document.get("format") == END_TO_END_FORMAT:
        _add_end_to_end(sources, path, seen)
    elif not isinstance(document, dict) or document.get("format") not in GEMM_FORMATS or "rows" not in document:
        sources.skipped.append(f"{path}: not a result of fastgemm.bench (format {GEMM_FORMATS[-1]})")
    elif path.resolve() not in seen:
        seen.add(path.resolve())
        rows = document["rows"]
        if document["format"] == 1:
            rows = [{**row, "kernel": _FORMAT_1_KERNELS.get(row["kernel"], row["kernel"])} for row in rows]
        sources.gemm.append({**document, "rows": rows, "path": str(path)})
