"""lm-eval's requests of a task, without evaluating it."""

from __future__ import annotations

import functools
from pathlib import Path

from odyssey.data.task_files import task_source


@functools.cache
def requests_of(name: str, num_fewshot: int, limit: int | None, root: Path, cache: Path) -> list:
    """lm-eval's requests for the first `limit` items; None takes them all. Read-only: every caller gets the same."""
    from lm_eval.tasks import TaskManager

    from odyssey.accuracy.harness import _compiled_once

    source = task_source(name, str(root), cache)
    manager = TaskManager(include_path=list(source.include_paths), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    with _compiled_once():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances
