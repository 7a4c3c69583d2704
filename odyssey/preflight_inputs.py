"""What a cell reads, looked at before it runs: the model, the texts, the tasks, and the hub that may have them.

os.path is asked where a Path would raise for a directory that this user may not enter.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from odyssey.config import CalibrationConfig, ModelConfig, PerplexityConfig, RootConfig, dataset_of
from odyssey.data.hub import find_snapshot
from odyssey.errors import OdysseyError
from odyssey.methods import build_method, existing_checkpoint
from odyssey.models.architecture import LlamaFamily
from odyssey.models.embedded import TINY_PATH
from odyssey.models.reader import CheckpointReader
from odyssey.sizes import ModelSizes, Texts

_HUB_TIMEOUT_S = 10
# Where a data set is under data.root, and the bytes of its text on the hub, by split.
_LOCAL = {
    ("wikitext2", "train"): ("wikitext2/wiki.train.raw", "wikitext-2-raw/wiki.train.raw"),
    ("wikitext2", "test"): ("wikitext2/wiki.test.raw", "wikitext-2-raw/wiki.test.raw"),
    ("c4", "train"): ("c4/*train*.json*",),
    ("c4", "test"): ("c4/*val*.json*",),
}
_HUB_TEXT_BYTES = {
    ("wikitext2", "train"): 11_000_000,
    ("wikitext2", "test"): 1_300_000,
    ("c4", "train"): 780_000_000,
    ("c4", "test"): 100_000_000,
    ("embedded", "train"): 700_000,
    ("embedded", "test"): 100_000,
}
# Text from compressed JSON lines.
_COMPRESSION = 2.5


@dataclass(frozen=True)
class Check:
    """One thing that a cell needs. ok: None where it could not be told. text: what was found, and what to do."""

    name: str
    ok: bool | None
    text: str


def model_config(model: ModelConfig) -> PreTrainedConfig | None:
    """The model's configuration without its weights: from its directory, the hub's cache, or the built-in sizes."""
    from odyssey.engine.shapes import known_config

    directory = TINY_PATH if model.name == "tiny" and model.path is None else model.path
    directory = directory or cached_snapshot(model)
    try:
        if directory is not None:
            return AutoConfig.from_pretrained(Path(directory).expanduser())
        return known_config(model.name)
    except Exception:  # whatever is wrong with the file: model_check says what
        return None


def model_sizes(model: ModelConfig) -> ModelSizes | None:
    """The model's sizes; None where they are not known before it is read, or are none of the LLaMA family."""
    config = model_config(model)
    try:
        return None if config is None else ModelSizes.from_config(config)
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def cached_snapshot(model: ModelConfig) -> Path | None:
    """The model's directory in the hub's cache, None when config.json is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not model.hub_id:
        return None
    found = try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def model_check(root: RootConfig) -> Check:
    model, name = root.model, "model"
    existing = existing_checkpoint(root.method)
    path = existing or model.path
    if path is None and model.name == "tiny":
        return Check(name, True, "embedded")
    if path is not None:
        try:
            return _directory_check(path, root.method.name if existing else None)
        except (OdysseyError, OSError) as error:
            return Check(name, False, str(error))
    if getattr(root.latency, "dummy_weights", False):
        return Check(name, True, "random weights")
    if not model.hub_id:
        return Check(name, False, "neither model.path nor model.hub_id is set")
    snapshot = cached_snapshot(model)
    if snapshot is not None and list(snapshot.glob("*.safetensors")):
        return Check(name, True, "in the hub's cache")
    return _hub_check(model.hub_id, model.revision)


def _directory_check(path: str, quantized_by: str | None) -> Check:
    """A checkpoint on disk; quantized_by: the method whose existing checkpoint it is. Raises what its readers raise."""
    name, directory = "model", Path(path).expanduser()
    if not directory.is_dir():
        return Check(name, False, f"{path}: no such directory")
    if not (directory / "config.json").is_file():
        return Check(name, False, f"{path}: no config.json")
    CheckpointReader(directory)
    LlamaFamily.from_directory(directory, quantized=quantized_by is not None)
    if quantized_by is not None:
        from baselines.checkpoint_import import read_layout

        read_layout(directory, quantized_by)
    return Check(name, True, "local")


@functools.cache
def _hub_check(hub_id: str, revision: str) -> Check:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = "model"
    if not hub_reachable():
        return Check(name, False, f"{hub_id}: the hub cannot be reached and the cache has no copy; give model.path=DIR")
    try:
        api = HfApi()
        info = api.model_info(hub_id, revision=revision, timeout=_HUB_TIMEOUT_S)
        if info.gated:
            api.auth_check(hub_id)
    except GatedRepoError:
        token = "this token has no access" if get_token() else "no token"
        return Check(name, False, f"{hub_id}: gated, {token}; accept its licence and run hf auth login")
    except RevisionNotFoundError:
        return Check(name, False, f"{hub_id}: no revision {revision}")
    except RepositoryNotFoundError:
        return Check(name, False, f"{hub_id}: no such repository, or private without a token")
    except Exception as error:  # the hub's client raises a different class for every way a request can fail
        return Check(name, None, f"{hub_id}: the hub did not answer ({type(error).__name__})")
    return Check(name, True, "on the hub")


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers at all; HF_HUB_OFFLINE counts as no."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return True


def data_checks(root: RootConfig) -> list[Check]:
    """One check for the calibration text and every text and task that is evaluated."""
    checks = []
    if root.data.root is not None and not os.path.isdir(Path(root.data.root).expanduser()):
        checks.append(Check("data.root", False, f"{root.data.root}: no such directory"))
    if _calibrates(root):
        dataset = dataset_of(root.calibration, root.model, default="c4")
        checks.append(_corpus_check("calibration", root.calibration, dataset, "train", root.data.root))
    group = root.accuracy.perplexity
    if group is not None:
        first = dataset_of(group, root.model, default="wikitext2")
        checks.append(_corpus_check("perplexity", group, first, "test", root.data.root))
        checks += [_corpus_check("perplexity", None, dataset, "test", root.data.root) for dataset in group.also]
    checks += [_task_check(task, root.data.root) for task in root.accuracy.tasks]
    return checks


def texts(root: RootConfig) -> Texts:
    """The sizes of the texts that a cell reads: of local files, or what the hub's data sets have."""
    calibration = evaluation = 0
    first = dataset_of(root.calibration, root.model, default="c4")
    if _calibrates(root):
        calibration = _text_bytes(root.calibration, first, "train", root.data.root)
    group, pieces = root.accuracy.perplexity, True
    if group is not None:
        named = dataset_of(group, root.model, default="wikitext2")
        sizes = {named: _text_bytes(group, named, "test", root.data.root)}
        sizes |= {dataset: _text_bytes(None, dataset, "test", root.data.root) for dataset in group.also}
        evaluation, pieces = max(sizes.values()), "c4" not in sizes
    return Texts(calibration, evaluation, first != "c4", pieces)


def _calibrates(root: RootConfig) -> bool:
    return build_method(root.method.name, root.method).needs_calibration and existing_checkpoint(root.method) is None


def _local_text(
    group: CalibrationConfig | PerplexityConfig | None, dataset: str, split: str, root: str | None
) -> Path | None:
    """The file that a text is read from, None when it is embedded or the hub's."""
    if group is not None and group.path is not None:
        return Path(group.path).expanduser()
    for pattern in _LOCAL.get((dataset, split), ()) if root else ():
        if found := next(Path(root).expanduser().glob(pattern), None):
            return found
    return None


def _text_bytes(group, dataset: str, split: str, root: str | None) -> int:
    file = _local_text(group, dataset, split, root)
    if file is None or not os.path.isfile(file):
        return _HUB_TEXT_BYTES.get((dataset, split), 0)
    return int(file.stat().st_size * (_COMPRESSION if file.suffix == ".gz" else 1))


def _corpus_check(
    name: str, group: CalibrationConfig | PerplexityConfig | None, dataset: str, split: str, root: str | None
) -> Check:
    if dataset == "embedded":
        return Check(name, True, "embedded")
    file = _local_text(group, dataset, split, root)
    if file is not None:
        found = os.path.isfile(file)
        return Check(name, found, str(file) if found else f"{file}: no such file")
    if find_snapshot(root, dataset) is not None:
        return Check(name, True, f"{dataset} in data.root, a cache of the hub")
    return _hub_data_check(name, dataset)


def _task_check(task: str, root: str | None) -> Check:
    from odyssey.data.task_files import local_file_names

    names = local_file_names(task) if root else ()
    if names and all(os.path.isfile(Path(root).expanduser() / name) for name in names):
        return Check(task, True, "in data.root")
    if find_snapshot(root, "mmlu" if task.startswith("mmlu_") else task) is not None:
        return Check(task, True, "in data.root, a cache of the hub")
    return _hub_data_check(task, task)


def _hub_data_check(name: str, what: str) -> Check:
    if hub_reachable():
        return Check(name, True, f"{what} from the hub")
    return Check(name, None, f"{what}: not in data.root, and the hub cannot be reached; only a cached copy would do")
