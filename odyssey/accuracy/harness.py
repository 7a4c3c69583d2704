"""One lm-eval task on a model that is already loaded: lm-eval's own prompts, scoring and metrics, no metric of ours.

Importing this module imports lm-eval (seconds); the cell does so only when tasks are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import time
from collections.abc import Iterator

import datasets
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from odyssey.data.task_files import TaskSource
from odyssey.errors import MissingDataError, UnsupportedError
from odyssey.progress import Progress

# For metrics without a closed form (LAMBADA's perplexity); accuracies have one.
BOOTSTRAP_ITERATIONS = 1000
# The metric that stands for a task: the first of these that it has, else its first one.
PRIMARY_METRICS = ("acc_norm", "acc")


class HarnessModel(HFLM):
    """lm-eval's adapter for Transformers models around a loaded model, its linear layers as they are.

    lm-eval sorts requests by length, longest first, and pads a batch on the right. Added here: progress, a count of
    the requests that do not fit into the model's positions (lm-eval cuts their context from the left), log-softmax in
    float32 whatever the logits' dtype is, and no KV cache where nothing is generated.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        prefix = None
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            # lm-eval conditions an empty context on this token and asks the tokenizer alone for it.
            prefix = model.config.bos_token_id
            if prefix is None:
                raise UnsupportedError("accuracy.tasks: neither the tokenizer nor config.json has a BOS or EOS token")
        with _quiet():
            # A copy of the tokenizer: lm-eval adds a padding token where there is none.
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
                softmax_dtype=torch.float32, prefix_token_id=prefix,
            )  # fmt: skip
        self.progress, self.title = Progress.silent(), ""
        self.requests = self.truncated = 0

    @contextlib.contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        """Progress over `count` requests: lm-eval tells its cache hook of every request that is answered."""
        with self.progress.task(f"lm-eval {self.title}", count) as task:
            self.set_cache_hook(_ProgressHook(task))
            yield
        self.requests += count

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        with self._counted(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        with self._counted(len(requests)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm: bool = False):
        with self._counted(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None):
        limit = self.max_length + 1
        self.truncated += sum(len(context) + len(continuation) > limit for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps, attn_mask=None, labels=None):
        with torch.no_grad():
            return self.model(inps, use_cache=False).logits


class _ProgressHook:
    """Stands where lm-eval's request cache would be; it keeps nothing."""

    def __init__(self, task) -> None:
        self._task = task

    def add_partial(self, attr, request, response) -> None:
        self._task.advance()


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
    truncated_requests, prompts_sha256 (every request's context and continuation, in order), origin and data_sha256;
    for a group the `subtasks`. Items: subtask -> document id -> {"prompts": hash of its requests, metric: value}.
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
    with _quiet():
        loaded = _load(source)
    for task in loaded["tasks"].values():
        # As lm-eval's command does: a task that fixes zero-shot in its definition keeps it.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    lm.progress, lm.title = progress or Progress.silent(), source.name
    lm.requests = lm.truncated = 0
    with _quiet():
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
        "batch_size": lm.batch_size,
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
    return result, {task: _items(samples[task]) for task in loaded["tasks"]}


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


def _items(samples: list[dict]) -> dict[str, dict]:
    items: dict[str, dict] = {}
    for sample in samples:
        item = items.setdefault(str(sample["doc_id"]), {"prompts": _sha256(sample["arguments"])[:16]})
        for metric in sample["metrics"]:
            label = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            item[label] = _plain(sample[metric])
    return items


def _plain(value):
    """A metric's value of one item as JSON: a number (a correct answer is 1.0), a list of them, or text."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No line for every truncated request (they are counted), and no pool of processes for the bootstrap: forking
    a process that holds a model on a GPU is asking for trouble."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
