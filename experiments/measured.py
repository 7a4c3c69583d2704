"""What records say, as measurements: a value with its cell, its protocol and where it comes from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from experiments.recipes import recipe_of
from odyssey.accuracy.statistics import PairedComparison
from odyssey.record import OK


class MixedProtocolsError(Exception):
    """Results that cannot be compared would share a column; the message says in one line which."""


@dataclass(frozen=True, order=True)
class Protocol:
    """How a result was obtained. Only results of the same protocol share a column.

    whole: not cut to its first windows.
    """

    dataset: str
    text: str
    settings: str
    window: int | None = None
    whole: bool = True

    def __str__(self) -> str:
        window = f"windows of {self.window} tokens, " if self.window else ""
        return f"{self.dataset} (text {self.text[:8]}), {window}{self.settings}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name this protocol on the command line."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Measurement:
    """value: None when the cell did not end ok, then outcome and note say why. model: as records call it. method: of
    conf/method. format: W4A8, ... recipe: the steps of an Odyssey cell. tokens: hash of what was evaluated. result:
    the record's entry that the value is from (of an average, the tasks' entries by name). path: of the record. paired:
    the comparison with FP16 on the same items."""

    model: str
    method: str
    format: str
    recipe: str | None
    value: float | None
    outcome: str
    device: str
    commit: str | None
    note: str | None
    protocol: Protocol | None = None
    tokens: str | None = None
    config: dict | None = None
    result: dict | None = None
    path: str | None = None
    paired: PairedComparison | None = None


def perplexities(records: Iterable[dict]) -> list[Measurement]:
    """Perplexities of every cell that was asked for one; a cell that did not end ok comes without a value or protocol
    for what it has not."""
    found = []
    for record in records:
        results = record.get("accuracy", {}).get("perplexity", {})
        for dataset, result in results.items():
            limit = record["config"]["accuracy"]["perplexity"].get("max_windows")
            # C4's protocol names its number of windows.
            limited = limit is not None and result["windows"] >= limit and dataset != "c4"
            settings = result["protocol"] + (f", only the first {limit} windows" if limited else "")
            found.append(
                _measurement(
                    record,
                    value=result["value"],
                    protocol=Protocol(dataset, result["text_sha256"], settings, result["window"], not limited),
                    tokens=result["tokens_sha256"],
                    simulated=result.get("simulated", False),
                    result=result,
                )
            )
        if record["outcome"] != OK and set(asked_datasets(record["config"])) - set(results):
            found.append(_measurement(record))
    return found


def task_accuracies(
    records: Iterable[dict], task: str, scale: float = 1.0, *, limited: bool = False
) -> list[Measurement]:
    """The primary metric of an lm-eval task, times `scale`, of every cell that was asked for it.

    limited: also results of the first so many items only (accuracy.limit), which are no figures of the task.
    """
    found = []
    for record in records:
        result = record.get("accuracy", {}).get("tasks", {}).get(task)
        if result is not None and result.get("limit") and not limited:
            continue
        if result is not None:
            protocol, simulated = _task_protocol(task, result), result.get("simulated", False)
            value = None if result["value"] is None else result["value"] * scale
            measurement = _measurement(record, value, protocol, simulated=simulated, result=result)
            # lm-eval's metric may be NaN, which JSON has no word for.
            found.append(measurement if value is not None else replace(measurement, outcome="not finite", note=None))
        elif record["outcome"] != OK and task in (record["config"].get("accuracy", {}).get("tasks") or ()):
            found.append(_measurement(record))
    return found


def task_averages(records: Iterable[dict], tasks: tuple[str, ...]) -> list[Measurement]:
    """The mean over tasks of their primary metrics, of every cell that has them all in full, and cells that failed
    while they were asked for all."""
    found = []
    for record in records:
        results = record.get("accuracy", {}).get("tasks", {})
        results = {task: result for task, result in results.items() if not result.get("limit")}
        if all(results.get(task, {}).get("value") is not None for task in tasks):
            protocols = [_task_protocol(task, results[task]) for task in tasks]
            protocol = Protocol(
                "average of " + ", ".join(tasks),
                hashlib.sha256("".join(each.text for each in protocols).encode()).hexdigest(),
                "; ".join(each.settings for each in protocols),
            )
            value = sum(results[task]["value"] for task in tasks) / len(tasks)
            simulated = any(results[task].get("simulated", False) for task in tasks)
            parts = {task: results[task] for task in tasks}
            found.append(_measurement(record, value, protocol, simulated=simulated, result=parts))
        elif record["outcome"] != OK and set(tasks) <= set(record["config"].get("accuracy", {}).get("tasks") or ()):
            found.append(_measurement(record))
    return found


def _task_protocol(task: str, result: dict) -> Protocol:
    """The prompts' hash fixes items, their order and the few-shot examples."""
    shots = f"{result['num_fewshot']}-shot" if result.get("num_fewshot") is not None else "the task's own shots"
    settings = f"{result['metric']}, {shots}, version {result.get('version')}, {result['items']} items"
    return Protocol(task, result["prompts_sha256"], settings)


def asked_datasets(config: dict) -> tuple[str, ...]:
    """The perplexity data sets that a cell was asked for, as its results would have named them."""
    group, model = config.get("accuracy", {}).get("perplexity"), config["model"]
    if not group or config.get("gemm", {}).get("bench", "none") != "none":
        return ()
    dataset = group.get("dataset", "auto")
    if group.get("path"):
        dataset = "c4" if dataset == "c4" else "file"
    elif dataset == "auto":
        dataset = "embedded" if model["name"] == "tiny" and not model.get("path") else "wikitext2"
    return (dataset, *group.get("also", ()))


def single_protocol(measurements: list[Measurement]) -> Protocol | None:
    """The protocol that all measurements share; None when there is no value among them.

    Raises MixedProtocolsError when they have several, or when a model was evaluated on different tokens.
    """
    protocols = defaultdict(list)
    for measurement in measurements:
        if measurement.protocol is not None:
            protocols[measurement.protocol].append(measurement)
    if len(protocols) > 1:
        listed = "; ".join(f"{each.digest} {each}: {len(found)}" for each, found in sorted(protocols.items()))
        raise MixedProtocolsError(
            f"records of {len(protocols)} protocols cannot share a column ({listed}); "
            "choose with --protocol, --dataset, --text, --window or --model, or name fewer directories"
        )
    tokens = {}
    for measurement in measurements:
        if measurement.protocol is None:
            continue
        first = tokens.setdefault(measurement.model, measurement.tokens)
        if first != measurement.tokens:
            raise MixedProtocolsError(
                f"{measurement.model} was evaluated on different tokens of the same text "
                f"(tokens_sha256 {first[:8]} and {measurement.tokens[:8]}), by another tokenizer: they cannot share a "
                "column; give the models different names (model.name)"
            )
    return next(iter(protocols), None)


def device_of(record: dict) -> str:
    """GPU or CPU name, and the dtype of what is not quantized."""
    environment = record.get("environment", {})
    gpu = environment.get("gpu")
    on_gpu = gpu and not str(record.get("device", "")).startswith("cpu")
    name = gpu["name"] if on_gpu else environment.get("cpu") or "CPU"
    dtype = record.get("model", {}).get("dtype")
    return f"{name}, {dtype}" if dtype else name


def model_of(record: dict) -> str:
    """The model's name, also of a cell that ended before it said it."""
    return record.get("model", {}).get("name") or record["config"]["model"]["name"]


def format_label(record: dict) -> str:
    """W4A8 and the like, also of a cell that ended before it said it."""
    return record.get("method", {}).get("label") or _format_of(record["config"]["method"])


def short_commit(commit: str | None) -> str | None:
    """Seven digits, and whether tracked files differed from the commit."""
    if not commit:
        return None
    return commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


def _measurement(
    record: dict, value=None, protocol=None, tokens=None, simulated=False, result: dict | None = None
) -> Measurement:
    config, method = record["config"], record.get("method", {})
    failed = None if value is not None else f"{record['outcome']}: {record.get('reason')}"
    simulated = simulated or method.get("arithmetic") == "simulated"
    return Measurement(
        model=model_of(record),
        method=config["method"]["name"],
        format=format_label(record),
        recipe=recipe_of(config),
        value=value,
        outcome=OK if value is not None else record["outcome"],
        device=device_of(record),
        commit=short_commit(record.get("environment", {}).get("git_commit")),
        note=joined_notes(["simulated" if simulated else None, failed]),
        protocol=protocol,
        tokens=tokens,
        config={**config, "checkpoint": record.get("model", {}).get("fingerprint")},
        result=result,
        path=record.get("path"),
    )


def _format_of(method: dict) -> str:
    """W4A8 and the like from the settings, for cells that ended before they said it themselves."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from odyssey.methods import build_method, settings_class

    try:
        settings = OmegaConf.merge(OmegaConf.structured(settings_class(method["name"])), method)
        return build_method(method["name"], OmegaConf.to_object(settings)).scheme.label
    except (OmegaConfBaseException, KeyError, ValueError):
        # Settings of another version of the project.
        return "unknown"


def joined_notes(parts: Iterable[str | None]) -> str | None:
    """A row's note from its parts; None of nothing."""
    return ", ".join(part for part in parts if part) or None
