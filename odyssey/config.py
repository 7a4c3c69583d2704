"""The typed schema of every config group. Hydra refuses unknown keys and wrong types against it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from odyssey.data.task_names import close_task_names, is_known_task
from odyssey.data.texts import DATASETS
from odyssey.errors import ConfigError
from odyssey.latency.names import ENGINES, PEERS
from odyssey.latency.names import METHODS as FORMATS
from odyssey.methods import METHODS, build_method, is_settings_of, settings_class

DEVICES = ("auto", "cpu", "cuda")
RETRIES = ("none", "failed")
AUTO = "auto"
# What torch takes for a seed and JSON for a whole number everywhere.
_LARGEST_SEED = 2**63 - 1


@dataclass
class ModelConfig:
    """name: how outputs and tables call it. hub_id: repository on the Hugging Face hub. path: a local directory in
    Hugging Face layout, which wins over hub_id. revision: branch, tag or commit on the hub. gated: whether the hub asks
    for an accepted licence (null: not known)."""

    name: str = MISSING
    hub_id: str | None = None
    path: str | None = None
    revision: str = "main"
    gated: bool | None = None


@dataclass
class CalibrationConfig:
    """dataset: auto (a file if `path` is set, the embedded text for model=tiny, C4 otherwise), or one by name.
    path: a text file or JSON lines with a "text" field. seqlen: tokens per sample, at most what the model takes."""

    dataset: str = AUTO
    path: str | None = None
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0


@dataclass
class PerplexityConfig:
    """dataset: auto (a file if `path` is set, the embedded text for model=tiny, WikiText-2 otherwise), or one by name.
    also: further data sets by name, one figure each. path: a text file, or with dataset=c4 a shard of C4.
    window: tokens per window, at most what the model takes. max_windows: evaluate only so many (null: all; of C4, 256
    windows that are drawn with `seed`)."""

    dataset: str = AUTO
    also: list[str] = field(default_factory=list)
    path: str | None = None
    window: int = 2048
    max_windows: int | None = None
    seed: int = 0


@dataclass
class AccuracyConfig:
    """perplexity: null leaves it out. tasks: lm-eval tasks by name. limit: evaluate only so many items of each task
    (null: all). num_fewshot: null takes each task's own (MMLU: 5). batch_size: requests per forward pass where
    text is generated. batch_tokens: tokens per forward pass where likelihoods are compared (padding included).
    simulate: fake quantization in place of the integers (labelled in the record)."""

    perplexity: PerplexityConfig | None = None
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    batch_tokens: int = 8192
    simulate: bool = False


@dataclass
class LatencyConfig:
    """engine: none; odyssey (the decode engine); transformers (eager, dynamic KV cache); vllm where it is installed.
    batch_size, input_len, output_len in tokens; warmup and repeats are whole runs. dummy_weights: random integers of
    the model's shapes in place of a checkpoint (odyssey and vllm). against: formats of the engine that take turns with
    the method in the same process; peers: likewise, of other engines. With engine=transformers it is always the
    unquantized model that takes turns."""

    engine: str = "none"
    batch_size: int = 1
    input_len: int = 1024
    output_len: int = 128
    warmup: int = 1
    repeats: int = 5
    dummy_weights: bool = False
    against: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)


@dataclass
class GemmConfig:
    """Single matrix products in place of a model: bench: none or fastgemm (the cell is one run of python -m
    fastgemm.bench). shapes: NxK sizes and names of models. m: numbers of tokens. against: kernels beside FastGEMM.
    rounds: samples of each kernel."""

    bench: str = "none"
    shapes: list[str] = field(default_factory=lambda: ["llama2-7b"])
    m: list[int] = field(default_factory=lambda: [1, 16, 64, 256, 1024, 4096])
    against: list[str] = field(default_factory=lambda: ["w8a8", "cublas-fp16", "int-mm"])
    rounds: int = 20


@dataclass
class TrackingConfig:
    """backend: none or wandb. mode: offline or online (wandb's). group: null groups a sweep's runs under the name of
    the sweep. dir: where runs are kept on disk (null: in each cell's directory). timeout_s: after so many seconds a
    run is given up; the cell's record is not touched."""

    backend: str = "none"
    mode: str = "offline"
    project: str = "odyssey"
    entity: str | None = None
    group: str | None = None
    dir: str | None = None
    timeout_s: float = 300.0


@dataclass
class DataConfig:
    """root: directory with local copies of the data sets (layout: odyssey/data/texts.py and task_files.py)."""

    root: str | None = None


@dataclass
class RootConfig:
    """One cell: a method on a model, what is measured, and where the record goes.

    retry: none runs every cell that has no record with outcome ok; failed runs only cells whose record says that
    they did not end ok, and leaves out those without a record. timeout_s: a cell that runs longer is stopped, with
    outcome timeout (null: no limit); what it finished is kept. preflight: only print what every cell needs and what it
    would miss, run nothing."""

    method: Any = MISSING
    model: ModelConfig = MISSING
    calibration: CalibrationConfig = MISSING
    accuracy: AccuracyConfig = MISSING
    latency: LatencyConfig = MISSING
    gemm: GemmConfig = field(default_factory=GemmConfig)
    tracking: TrackingConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = "outputs"
    seed: int = 0
    device: str = AUTO
    force: bool = False
    retry: str = "none"
    timeout_s: float | None = None
    preflight: bool = False


def register_schemas() -> None:
    """Make the schemas known to Hydra; conf/<group>/*.yaml name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="root_schema", node=RootConfig)
    for name in METHODS:
        store.store(group="method", name=f"{name}_schema", node=settings_class(name))
    for group, node in (
        ("model", ModelConfig),
        ("calibration", CalibrationConfig),
        ("accuracy", AccuracyConfig),
        ("latency", LatencyConfig),
        ("gemm", GemmConfig),
        ("tracking", TrackingConfig),
    ):
        store.store(group=group, name=f"{group}_schema", node=node)


def validate(config: DictConfig) -> RootConfig:
    """The config as dataclass objects, with value ranges and combinations checked.

    Raises ConfigError: one line naming the key and what it may be.
    """
    method_name = config.method.name
    if method_name not in METHODS:
        raise ConfigError(f"method.name={method_name}: allowed: {', '.join(METHODS)}")
    try:
        settings = OmegaConf.to_object(config.method)
        if not is_settings_of(method_name, settings):
            raise ConfigError(
                f"method.name={method_name}: these are another method's settings; use method={method_name}"
            )
        build_method(method_name, settings)
    except ValueError as error:
        # The scheme speaks of weight_bits, the key is method.bits.
        raise ConfigError(f"method.{error}".replace("weight_bits", "bits")) from error
    groups = ("model", "calibration", "accuracy", "latency", "gemm", "tracking", "data")
    scalars = ("output_dir", "seed", "device", "force", "retry", "timeout_s", "preflight")
    root = RootConfig(
        method=settings,
        **{name: OmegaConf.to_object(config[name]) for name in groups},
        **{name: config[name] for name in scalars},
    )
    _check_values(root)
    _check_choice("device", root.device, DEVICES)
    _check_choice("retry", root.retry, RETRIES)
    if root.force and root.retry == "failed":
        raise ConfigError("retry=failed: cannot be combined with force=true, which runs finished cells again, too")
    _check_choice("latency.engine", root.latency.engine, ENGINES)
    _check_choice("tracking.backend", root.tracking.backend, ("none", "wandb"))
    _check_choice("tracking.mode", root.tracking.mode, ("offline", "online"))
    for key, value in (("timeout_s", root.timeout_s), ("tracking.timeout_s", root.tracking.timeout_s)):
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value:g}: must be more than 0 seconds")
        if value is not None and value > threading.TIMEOUT_MAX:
            raise ConfigError(f"{key}={value:g}: must be at most {threading.TIMEOUT_MAX:g} seconds")
    _check_gemm(root.gemm)
    _check_dataset("calibration", root.calibration)
    if root.accuracy.perplexity is not None:
        _check_dataset("accuracy.perplexity", root.accuracy.perplexity)
        _check_further_datasets(root)
        _check_at_least("accuracy.perplexity.window", root.accuracy.perplexity.window, 2)
        if root.accuracy.perplexity.max_windows is not None:
            _check_at_least("accuracy.perplexity.max_windows", root.accuracy.perplexity.max_windows, 1)
    _check_tasks(root.accuracy)
    for key, value in (
        ("calibration.num_samples", root.calibration.num_samples),
        ("calibration.seqlen", root.calibration.seqlen),
        ("latency.batch_size", root.latency.batch_size),
        ("latency.input_len", root.latency.input_len),
        ("latency.output_len", root.latency.output_len),
        ("latency.repeats", root.latency.repeats),
    ):
        _check_at_least(key, value, 1)
    _check_at_least("latency.warmup", root.latency.warmup, 0)
    _check_latency(root)
    if root.accuracy.simulate and method_name == "fp16":
        raise ConfigError("accuracy.simulate=true: method=fp16 has nothing to simulate; choose another method")
    return root


def _check_values(root: RootConfig) -> None:
    """What no key may be, whatever it means."""
    for key, value in _leaves(asdict(root)):
        if value == "":
            # From a shell variable that is not set; as a path it would be the working directory.
            raise ConfigError(f"{key}=: must not be empty; give a value, or leave the key out")
        if isinstance(value, float) and math.isinf(value):
            raise ConfigError(f"{key}={value}: must be finite")
        if key.rpartition(".")[2] == "seed" and not 0 <= value <= _LARGEST_SEED:
            raise ConfigError(f"{key}={value}: must be 0 to {_LARGEST_SEED}")
    if root.output_dir.startswith("~"):
        raise ConfigError(f"output_dir={root.output_dir}: ~ stands for nothing here; write the whole path")
    if "/" in root.model.name or root.model.name in (".", ".."):
        raise ConfigError(f"model.name={root.model.name}: names a directory under output_dir, and cannot be a path")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no group or list, with its dotted key."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each, key)
    else:
        yield key, value


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value}: allowed: {', '.join(allowed)}")


def _check_at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{key}={value}: must be at least {minimum}")


def _check_dataset(key: str, group: CalibrationConfig | PerplexityConfig) -> None:
    _check_choice(f"{key}.dataset", group.dataset, (AUTO, *DATASETS))
    if group.dataset == "file" and group.path is None:
        raise ConfigError(f"{key}.path: must name a file when {key}.dataset=file")
    if group.path is not None and group.dataset not in (AUTO, "file", "c4"):
        raise ConfigError(f"{key}.path: cannot be combined with {key}.dataset={group.dataset}; leave the dataset out")


def _check_latency(root: RootConfig) -> None:
    group = root.latency
    for key, names, allowed in (("against", group.against, FORMATS), ("peers", group.peers, PEERS)):
        for name in names:
            _check_choice(f"latency.{key}", name, allowed)
        if names and group.engine != "odyssey":
            raise ConfigError(f"latency.{key}: takes turns with latency.engine=odyssey only; leave it empty")
    if group.dummy_weights:
        if group.engine not in ("odyssey", "vllm"):
            raise ConfigError("latency.dummy_weights=true: only with latency=engine or latency.engine=vllm")
        if root.accuracy.perplexity is not None or root.accuracy.tasks:
            raise ConfigError("latency.dummy_weights=true: random weights have no accuracy; add accuracy=none")


def _check_gemm(group: GemmConfig) -> None:
    _check_choice("gemm.bench", group.bench, ("none", "fastgemm"))
    for key, values in (("shapes", group.shapes), ("m", group.m)):
        if not values:
            raise ConfigError(f"gemm.{key}: must name at least one")
    for value in group.m:
        _check_at_least("gemm.m", value, 1)
    _check_at_least("gemm.rounds", group.rounds, 1)


def _check_further_datasets(root: RootConfig) -> None:
    allowed = [name for name in DATASETS if name != "file"]
    seen = {dataset_of(root.accuracy.perplexity, root.model, default="wikitext2")}
    for name in root.accuracy.perplexity.also:
        _check_choice("accuracy.perplexity.also", name, (*allowed,))
        if name in seen:
            raise ConfigError(f"accuracy.perplexity.also: {name} is named twice")
        seen.add(name)


def _check_tasks(group: AccuracyConfig) -> None:
    for key, value, minimum in (("limit", group.limit, 1), ("num_fewshot", group.num_fewshot, 0)):
        if value is not None:
            _check_at_least(f"accuracy.{key}", value, minimum)
    _check_at_least("accuracy.batch_size", group.batch_size, 1)
    _check_at_least("accuracy.batch_tokens", group.batch_tokens, 1)
    for name in group.tasks:
        if group.tasks.count(name) > 1:
            raise ConfigError(f"accuracy.tasks: {name} is named twice")
        if not is_known_task(name):
            close = ", ".join(close_task_names(name)) or "none"
            raise ConfigError(
                f"accuracy.tasks: {name} is no lm-eval task or group (of a tag, name the tasks); similar names: {close}"
            )


def dataset_of(group: CalibrationConfig | PerplexityConfig, model: ModelConfig, default: str) -> str:
    """Resolve dataset=auto."""
    if group.path is not None:
        return "c4" if group.dataset == "c4" else "file"
    if group.dataset != AUTO:
        return group.dataset
    return "embedded" if model.name == "tiny" and model.path is None else default


def typed_config(content: DictConfig) -> DictConfig:
    """A resolved config that was read back from YAML, under the schema again."""
    typed = OmegaConf.structured(RootConfig)
    typed.method = OmegaConf.structured(settings_class(content.method.name))
    for name, node in (
        ("model", ModelConfig),
        ("calibration", CalibrationConfig),
        ("accuracy", AccuracyConfig),
        ("latency", LatencyConfig),
        ("gemm", GemmConfig),
        ("tracking", TrackingConfig),
    ):
        typed[name] = OmegaConf.structured(node)
    return OmegaConf.merge(typed, content)
