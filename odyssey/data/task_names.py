"""Names of lm-eval tasks, known without importing lm-eval or building its index, which take seconds."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from pathlib import Path

# Task name -> folder of its definition under lm_eval/tasks. Only these folders are read for these tasks.
TASK_FOLDERS = {
    "lambada_openai": "lambada",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "hellaswag": "hellaswag",
    "hellaswag_preprocessed": "hellaswag",
    "mmlu": "mmlu/default",
}
_NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]+["']?([^\s"'#]+)""", re.MULTILINE)


def definitions_directory() -> Path:
    """lm_eval/tasks of the installed lm-eval. Raises ModuleNotFoundError when it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        raise ModuleNotFoundError("lm-eval is not installed; pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


def task_folder(name: str) -> Path | None:
    """The folder with the definition of a task that is known without searching: the tasks above, MMLU's subjects and
    categories. None for any other task."""
    if name in TASK_FOLDERS:
        return definitions_directory() / TASK_FOLDERS[name]
    folder = definitions_directory() / TASK_FOLDERS["mmlu"]
    is_subject = name.startswith("mmlu_") and any((folder / f"{prefix}{name}.yaml").is_file() for prefix in ("", "_"))
    return folder if is_subject else None


@functools.cache
def _all_names() -> frozenset[str]:
    """The names of all tasks and groups (not tags) that lm-eval's definitions contain, read as text."""
    contents = (path.read_bytes() for path in definitions_directory().rglob("*.yaml"))
    return frozenset(name.decode(errors="replace") for content in contents for name in _NAME.findall(content))


def is_known_task(name: str) -> bool:
    """Whether a name can be evaluated. Reads all of lm-eval's definitions only for a name that is not well known."""
    return task_folder(name) is not None or name in _all_names()


def close_task_names(name: str) -> list[str]:
    """Up to three known names that look like `name`."""
    return difflib.get_close_matches(name, sorted(_all_names() | TASK_FOLDERS.keys()), n=3)
