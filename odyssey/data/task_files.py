"""lm-eval tasks from local files: `data.root` with the official rows, lm-eval's own prompts and metrics.

Layout of `data.root` (all optional, the hub is asked for what is not there):
    lambada/lambada_test.jsonl                  lambada_openai: {"text"}, OpenAI's version, 5153 rows
    piqa/valid.jsonl, valid-labels.lst          piqa: {"goal", "sol1", "sol2"}; one label per line, 1838 rows
    winogrande/winogrande_xl_validation.jsonl   winogrande: {"sentence", "option1", "option2", "answer"}, 1267 rows
    arc/ARC-Easy_test.jsonl                     arc_easy: {"question", "choices": {"text", "label"}, "answerKey"}, 2376
    hellaswag/hellaswag_val.jsonl               hellaswag: {"activity_label", "ctx_a", "ctx_b", "endings", "label"}
    hellaswag/hellaswag_val_preprocessed.jsonl  hellaswag_preprocessed: {"query", "endings", "label"}, 10042 rows
    mmlu/mmlu_test.jsonl, mmlu_dev.jsonl        mmlu: {"subject", "question", "choices", "answer"}, 14042 and 285 rows
    [hub/]datasets--OWNER--NAME/snapshots/*     any of them in the layout of the hub's own cache

A file is checked for its columns and its number of rows, written in the shape that lm-eval's definition expects into a
cache directory (never into data.root), and joined to that definition by a generated YAML file that includes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from odyssey.data.hub import HUB_DATASETS, Snapshot, find_snapshot
from odyssey.data.task_names import definitions_directory, task_folder
from odyssey.errors import MissingDataError

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Counted into the name of a cached conversion: raise it when what is written below changes.
_CONVERSION = 1
# MMLU's definition leaves the number of examples open; 5 is the published protocol.
_MMLU_FEWSHOT = 5


@dataclass(frozen=True)
class TaskSource:
    """Where lm-eval finds a task.

    include_paths: folders with its definition, later ones win. include_defaults: search all of lm-eval's definitions.
    origin: local file names, or "hub". data_sha256: of the local files. has_fewshot: whether examples for a few-shot
    prompt come from another split than the evaluated one. num_fewshot: the published protocol's number of examples
    where the definition has none. hint: what to do when the data cannot be read.
    """

    name: str
    include_paths: tuple[Path, ...]
    include_defaults: bool
    origin: str
    data_sha256: str | None
    has_fewshot: bool
    num_fewshot: int | None
    hint: str


@dataclass(frozen=True)
class _LocalTask:
    """How a task is read from data.root: evaluation file first; `rows` of each JSON-lines file; `definition` under
    lm_eval/tasks; `split` the definition's split; `convert` gives rows in the definition's shape."""

    files: tuple[str, ...]
    rows: int
    columns: tuple[str, ...]
    definition: str
    split: str
    convert: Callable[[list[dict], list[Path]], Iterable[dict]] = lambda rows, files: rows
    overrides: tuple[str, ...] = ()


def _with_piqa_labels(rows: list[dict], files: list[Path]) -> list[dict]:
    labels = files[1].read_text(encoding="utf-8").split()
    if len(labels) != len(rows) or not set(labels) <= {"0", "1"}:
        raise MissingDataError(f"{files[1]}: needs {len(rows)} lines of 0 or 1, one for each row of {files[0].name}")
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _preprocessed_hellaswag(rows: list[dict], files: list[Path]) -> list[dict]:
    return [{"query": row["query"], "choices": row["endings"], "label": int(row["label"])} for row in rows]


_LOCAL_TASKS = {
    "lambada_openai": _LocalTask(
        ("lambada/lambada_test.jsonl",), 5153, ("text",), "lambada/lambada_openai.yaml", "test_split"
    ),
    "piqa": _LocalTask(
        ("piqa/valid.jsonl", "piqa/valid-labels.lst"), 1838, ("goal", "sol1", "sol2"),
        "piqa/piqa.yaml", "validation_split", _with_piqa_labels,
    ),
    "winogrande": _LocalTask(
        ("winogrande/winogrande_xl_validation.jsonl",), 1267, ("sentence", "option1", "option2", "answer"),
        "winogrande/default.yaml", "validation_split",
    ),
    "arc_easy": _LocalTask(
        ("arc/ARC-Easy_test.jsonl",), 2376, ("question", "choices", "answerKey"), "arc/arc_easy.yaml", "test_split"
    ),
    "hellaswag": _LocalTask(
        ("hellaswag/hellaswag_val.jsonl",), 10042, ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        "hellaswag/hellaswag.yaml", "validation_split",
    ),
    "hellaswag_preprocessed": _LocalTask(
        ("hellaswag/hellaswag_val_preprocessed.jsonl",), 10042, ("query", "endings", "label"),
        "hellaswag/hellaswag.yaml", "validation_split", _preprocessed_hellaswag, ("process_docs: null",),
    ),
}  # fmt: skip
_MMLU_FILES = ("mmlu/mmlu_test.jsonl", "mmlu/mmlu_dev.jsonl")
_MMLU_ROWS = (14042, 285)
_MMLU_COLUMNS = ("subject", "question", "choices", "answer")


def task_source(name: str, root: str | None, cache: Path) -> TaskSource:
    """Find a task: its local files under `root` where they are, else lm-eval's definition, which asks the hub.

    cache: directory for converted files. Raises MissingDataError for a local file that is damaged or incomplete, and
    for a task that exists as a local file only.
    """
    folder = task_folder(name)
    is_mmlu = _is_mmlu(name)
    fewshot = _MMLU_FEWSHOT if is_mmlu else None
    names = local_file_names(name)
    where = root or "DIR"
    copies = " and ".join(f"{where}/{file}" for file in names)
    family = "mmlu" if is_mmlu else name
    fetched = f", or fetch it where the hub answers: python -m odyssey.data fetch --tasks {family} --to {where}"
    hint = (
        f"put a copy at {copies}{fetched if family in HUB_DATASETS else ''}"
        + ("" if root else ", and set data.root=DIR")
        if names
        else "run once where the hub answers, its cache serves later runs"
    )
    files = [Path(root).expanduser() / file for file in names] if root else []
    if files and all(file.is_file() for file in files):
        generated, digest = _generate(name, is_mmlu, files, Path(cache))
        paths = (folder, generated) if is_mmlu else (generated,)
        return TaskSource(name, paths, False, ", ".join(file.name for file in files), digest, is_mmlu, fewshot, hint)
    snapshot = find_snapshot(root, family)
    if snapshot is not None:
        generated, digest = _include_snapshot(name, is_mmlu, snapshot, Path(cache))
        paths = (folder, generated) if is_mmlu else (generated,)
        return TaskSource(name, paths, False, snapshot.origin, digest, True, fewshot, hint)
    if name == "hellaswag_preprocessed":
        raise MissingDataError(f"{name}: exists as a local file only; {hint}")
    return TaskSource(name, (folder,) if folder else (), folder is None, "hub", None, True, fewshot, hint)


def check_task_files(name: str, root: Path) -> None:
    """Raises MissingDataError, one line, unless the task's files under `root` are whole: rows, columns, labels."""
    files = [root / file for file in local_file_names(name)]
    for file in files:
        if not file.is_file():
            raise MissingDataError(f"{file}: no such file")
    if _is_mmlu(name):
        for file, count in zip(files, _MMLU_ROWS, strict=True):
            _read_rows(file, count, _MMLU_COLUMNS)
    else:
        task = _LOCAL_TASKS[name]
        list(task.convert(_read_rows(files[0], task.rows, task.columns), files))


def task_columns(name: str) -> tuple[str, ...]:
    """The columns of a task's rows in its local files."""
    return _MMLU_COLUMNS if _is_mmlu(name) else _LOCAL_TASKS[name].columns


def local_file_names(name: str) -> tuple[str, ...]:
    """The files of a task relative to data.root; empty for a task that only the hub has."""
    if _is_mmlu(name):
        return _MMLU_FILES
    return _LOCAL_TASKS[name].files if name in _LOCAL_TASKS else ()


def _is_mmlu(name: str) -> bool:
    return name not in _LOCAL_TASKS and task_folder(name) is not None


def _include_snapshot(name: str, is_mmlu: bool, snapshot: Snapshot, cache: Path) -> tuple[Path, str]:
    """Definitions that read a copy in the hub's cache layout; returns their folder and the data's hash."""
    digest = snapshot.digest()
    setting = f"{_CONVERSION} {digest} {snapshot.path.resolve()} {definitions_directory()} {cache.resolve()}"
    family = "mmlu" if is_mmlu else name
    target = cache.resolve() / f"{family}-hub-{hashlib.sha256(setting.encode()).hexdigest()[:12]}"
    definitions = {name: _LOCAL_TASKS[name].definition} if not is_mmlu else {
        path.stem: f"mmlu/default/{path.name}"
        for path in sorted((definitions_directory() / "mmlu/default").glob("mmlu_*.yaml"))
    }  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    for task, definition in definitions.items():
        keys = {
            "include": str(definitions_directory() / definition),
            "task": task,
            "dataset_path": str(snapshot.path.resolve()),
            "dataset_kwargs": {"cache_dir": str(target / "arrow")},
        }
        partial = target / f".{task}.{os.getpid()}.partial"
        partial.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
        partial.rename(target / f"{task}.yaml")
    return target, digest


def _generate(name: str, is_mmlu: bool, files: list[Path], cache: Path) -> tuple[Path, str]:
    """Write data and definitions unless this content was converted before; returns the folder and the data's hash."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    family = "mmlu" if is_mmlu else name
    setting = (
        f"{_CONVERSION} {digest} {importlib.metadata.version('lm_eval')} {definitions_directory()} {cache.resolve()}"
    )
    target = cache.resolve() / f"{family}-{hashlib.sha256(setting.encode()).hexdigest()[:12]}"
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            if is_mmlu:
                _write_mmlu(files, partial, target)
            else:
                _write_task(name, _LOCAL_TASKS[name], files, partial, target)
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have been first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target, digest


def _write_task(name: str, task: _LocalTask, files: list[Path], partial: Path, target: Path) -> None:
    rows = list(task.convert(_read_rows(files[0], task.rows, task.columns), files))
    _write_rows(partial / "rows.jsonl", rows)
    text = _definition(name, task.definition, {task.split: target / "rows.jsonl"}, target, task.overrides)
    (partial / f"{name}.yaml").write_text(text)


def _write_mmlu(files: list[Path], partial: Path, target: Path) -> None:
    by_split = {}
    for split, file, count in zip(("test_split", "fewshot_split"), files, _MMLU_ROWS, strict=True):
        subjects: dict[str, list[dict]] = {}
        for row in _read_rows(file, count, _MMLU_COLUMNS):
            subjects.setdefault(row["subject"], []).append(row)
        by_split[split] = subjects
    for subject in by_split["test_split"]:
        data_files = {}
        for split, subjects in by_split.items():
            data_files[split] = target / f"{subject}.{split}.jsonl"
            _write_rows(partial / data_files[split].name, subjects.get(subject, []))
        name = f"mmlu_{subject}"
        (partial / f"{name}.yaml").write_text(_definition(name, f"mmlu/default/{name}.yaml", data_files, target))


def _definition(
    name: str, definition: str, data_files: dict[str, Path], target: Path, overrides: tuple[str, ...] = ()
) -> str:
    """A task definition that takes everything but the data from lm-eval's own. JSON strings are valid YAML."""
    splits = {split: split.removesuffix("_split") if split in data_files else None for split in _SPLITS}
    keys = {
        "include": str(definitions_directory() / definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {splits[split]: str(file) for split, file in data_files.items()},
            "cache_dir": str(target / "arrow"),
        },
        **splits,
    }
    return "\n".join([*(f"{key}: {json.dumps(value)}" for key, value in keys.items()), *overrides, ""])


def _read_rows(file: Path, count: int, columns: tuple[str, ...]) -> list[dict]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append({column: row[column] for column in columns})
            except (ValueError, KeyError, TypeError) as error:
                raise MissingDataError(
                    f"{file}: line {number} is not a JSON object with {', '.join(columns)}; fetch the file again"
                ) from error
    if len(rows) != count:
        raise MissingDataError(f"{file}: has {len(rows)} rows, the official split has {count}; fetch the whole file")
    return rows


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
