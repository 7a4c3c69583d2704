"""One lm-eval task on a model that is already loaded: lm-eval's own prompts, scoring and metrics, no metric of ours.

Importing this module imports lm-eval (seconds); the cell does so only when tasks are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterator

import datasets
import lm_eval.utils
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from odyssey.accuracy.adapter import HarnessModel, quiet
from odyssey.data.task_files import TaskSource
from odyssey.errors import MissingDataError, UnsupportedError
from odyssey.progress import Progress

# For metrics without a closed form (LAMBADA's perplexity); accuracies have one.
BOOTSTRAP_ITERATIONS = 1000
# The metric that stands for a task: the first of these that it has, else its first one.
PRIMARY_METRICS = ("acc_norm", "acc")


def evaluate_task(
    lm: HarnessModel,
    source: TaskSource,
    *,
    num_fewshot: int | None,
    limit: int | None,
    progress: Progress | None = None,
) -> tuple[dict, dict]:
    """Evaluate one task or group of tasks; returns a JSON-ready result and the per-item results.

    limit: the first so many items, of each subtask for a group. num_fewshot: None takes the task's own number.
    Result: metric, value, stderr (the primary metric) and all of `metrics`; version, num_fewshot, items, requests,
    truncated_requests, tokens_computed, tokens_unshared, gpu_seconds (see HarnessModel), prompts_sha256 (every
    request's context and continuation, in order), origin and data_sha256; for a group the `subtasks`.
    Items: subtask -> document id -> {"answer": what the model chose, metric: value}.
    Raises MissingDataError when the data cannot be had, UnsupportedError for a name that is a tag, for few-shot
    examples that could only come from the evaluated items, and ValueError when the model's log-likelihoods have NaN.
    """
    started = time.monotonic()
    num_fewshot = source.num_fewshot if num_fewshot is None else num_fewshot
    if num_fewshot and not source.has_fewshot:
        raise UnsupportedError(
            f"{source.name}: accuracy.num_fewshot={num_fewshot} needs examples from another split, which data.root "
            "does not have; use accuracy.num_fewshot=0 or leave data.root out"
        )
    with quiet():
        loaded = _load(source)
    for task in loaded["tasks"].values():
        # As lm-eval's command does: a task that fixes zero-shot in its definition keeps it.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    lm.start(source.name, progress or Progress.silent())
    with quiet(), _compiled_once():
        output = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True)
    samples = output["samples"]
    _check_finite(source.name, samples)
    name = source.name
    fewshot = {output["n-shot"][task] for task in loaded["tasks"]}
    result = {
        **_summary(output["results"][name]),
        "metrics": _metrics(output["results"][name]),
        "version": output["versions"][name],
        "num_fewshot": fewshot.pop() if len(fewshot) == 1 else None,
        "items": sum(output["n-samples"][task]["effective"] for task in loaded["tasks"]),
        "items_in_split": sum(output["n-samples"][task]["original"] for task in loaded["tasks"]),
        "limit": limit,
        "requests": lm.requests,
        "truncated_requests": lm.truncated,
        "tokens_computed": lm.tokens_computed,
        "tokens_unshared": lm.tokens_unshared,
        "gpu_seconds": lm.gpu_seconds,
        "batch_size": lm.batch_size,
        "batch_tokens": lm.batch_tokens,
        "prompts_sha256": _prompts_sha256(samples),
        "origin": source.origin,
        "data_sha256": source.data_sha256,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "seconds": time.monotonic() - started,
    }
    if loaded["groups"]:
        result["subtasks"] = {
            task: {**_summary(output["results"][task]), "items": output["n-samples"][task]["effective"]}
            for task in loaded["tasks"]
        }
    return result, {name: _items(task, samples[name]) for name, task in loaded["tasks"].items()}


def _load(source: TaskSource) -> dict:
    """lm-eval's task objects; constructing one reads its data."""
    manager = TaskManager(include_path=list(source.include_paths), include_defaults=source.include_defaults)
    entry = manager.task_index.get(source.name)
    if entry is None:
        raise UnsupportedError(f"accuracy.tasks: lm-eval has no task {source.name}")
    if entry.kind.name == "TAG":
        raise UnsupportedError(f"accuracy.tasks: {source.name} is a tag of {', '.join(sorted(entry.tags))}; name those")
    datasets.disable_progress_bars()
    try:
        loaded = manager.load([source.name])
    except ImportError as error:
        raise UnsupportedError(f"{source.name}: lm-eval needs a package for it ({_first_line(error)})") from error
    except Exception as error:  # datasets raises a different class for every way a download can fail
        raise MissingDataError(
            f"{source.name}: its data cannot be read ({type(error).__name__}: {_first_line(error)}); {source.hint}"
        ) from error
    group: Group | None = loaded["groups"].get(source.name)
    if group is not None and not group.has_aggregation:
        raise UnsupportedError(
            f"accuracy.tasks: {source.name} is a group without a figure of its own; name its tasks: "
            + ", ".join(group.child_names)
        )
    for task in loaded["tasks"].values():
        _check_supported(source.name, task)
    return loaded


def _check_supported(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UnsupportedError(f"{name}: executes code that the model writes; not run here")
    if getattr(task, "MULTIMODAL", False):
        raise UnsupportedError(f"{name}: needs a multimodal model")


def _metrics(results: dict) -> dict[str, dict]:
    """{metric: {"value", "stderr"}} from lm-eval's "metric,filter" keys."""
    metrics = {}
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        label = name if filter_name == "none" else key
        metrics[label] = {"value": _finite(value), "stderr": _finite(results.get(f"{name}_stderr,{filter_name}"))}
    return metrics


def _summary(results: dict) -> dict:
    """The primary metric's name, value and standard error."""
    metrics = _metrics(results)
    if not metrics:
        raise UnsupportedError(f"{results['name']}: lm-eval has no metric for it")
    primary = next((name for name in PRIMARY_METRICS if name in metrics), next(iter(metrics)))
    return {"metric": primary, **metrics[primary]}


def _finite(value) -> float | None:
    """lm-eval says "N/A" where a metric has no standard error; JSON has no infinities."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _check_finite(name: str, samples: dict[str, list[dict]]) -> None:
    for sample in (sample for task in samples.values() for sample in task):
        for response in sample["filtered_resps"]:
            value = response[0] if isinstance(response, list | tuple) and response else response
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name}: the model's log-likelihood of document {sample['doc_id']} is not finite")


def _prompts_sha256(samples: dict[str, list[dict]]) -> str:
    digest = hashlib.sha256()
    for task in sorted(samples):
        for sample in samples[task]:
            digest.update(f"{task} {sample['doc_id']} {_sha256(sample['arguments'])}\n".encode())
    return digest.hexdigest()


def _sha256(content) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _items(task: Task, samples: list[dict]) -> dict[str, dict]:
    items: dict[str, dict] = {}
    for sample in samples:
        item = items.setdefault(str(sample["doc_id"]), {"answer": _answer(task, sample)})
        for metric in sample["metrics"]:
            label = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            item[label] = _plain(sample[metric])
    return items


def _answer(task: Task, sample: dict) -> int | str:
    """What the model chose: of a choice, its index by the metric that stands for the task; of one continuation, 1 when
    it is the most likely one; of generated text, its hash; of anything else, the empty string."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        values = np.array([value for value, _ in responses[: len(choices)]])
        if "acc_norm" in sample["metrics"]:
            values = values / np.array([float(len(choice)) for choice in choices])
        return int(np.argmax(values))
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(responses[0][1])
    return _sha256(responses)[:8] if task.OUTPUT_TYPE == "generate_until" else ""


def _plain(value):
    """A metric's value of one item as JSON: a number (a correct answer is 1.0), a list of them, or text."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else str(value)


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """Keep lm-eval's prompt templates compiled: it compiles one anew for every prompt, minutes for MMLU's."""
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
