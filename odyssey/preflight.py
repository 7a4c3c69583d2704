"""Before the first hour is spent: what a cell will take, and what it would miss.

Nothing is loaded or downloaded beyond a model's config.json; the hub is asked once for each repository.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from transformers import AutoConfig, PreTrainedConfig

from odyssey.config import CalibrationConfig, ModelConfig, PerplexityConfig, RootConfig, dataset_of
from odyssey.errors import OdysseyError
from odyssey.footprint import Footprint, ModelSizes, footprint
from odyssey.methods import build_method, existing_checkpoint
from odyssey.models.embedded import TINY_PATH
from odyssey.models.reader import CheckpointReader
from odyssey.record import model_directory_name

_HUB_TIMEOUT_S = 10
_GEMM_SECONDS, _GEMM_HOST_BYTES, _GEMM_GPU_BYTES = 1800.0, 4 * 2**30, 8 * 2**30
_UNKNOWN_HOST_BYTES, _UNKNOWN_SECONDS = 16 * 2**30, 4 * 3600.0


@dataclass(frozen=True)
class Check:
    """One thing that a cell needs. ok: None where it could not be told. text: what was found, and what to do."""

    name: str
    ok: bool | None
    text: str


@dataclass
class Prediction:
    """What one cell is predicted to take; gpu_bytes is 0 on CPU, known False where the model's sizes are not known."""

    label: str
    model: str
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float
    known: bool = True
    checks: list[Check] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """False when a check failed: the cell would not end ok."""
        return not any(check.ok is False for check in self.checks)


def predict(root: RootConfig) -> Prediction:
    """Memory, disk and time of one cell, without checks. A model whose sizes are not known gets round figures."""
    on_gpu = uses_gpu(root)
    if root.gemm.bench != "none":
        return Prediction("GEMM", "", _GEMM_GPU_BYTES, _GEMM_HOST_BYTES, 2**20, _GEMM_SECONDS)
    scheme = build_method(root.method.name, root.method).scheme
    label, model = f"{root.method.name} {scheme.label}", model_directory_name(root)
    config = model_config(root.model)
    if config is None:
        return Prediction(label, model, 0, _UNKNOWN_HOST_BYTES, 0, _UNKNOWN_SECONDS, known=False)
    sizes = ModelSizes.from_config(config)
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    free = psutil.virtual_memory().available
    found: Footprint = footprint(root, sizes, scheme, on_gpu=on_gpu, cores=cores, free_bytes=free)
    disk = found.disk_bytes
    if root.model.path is None and root.model.name != "tiny" and cached_snapshot(root.model) is None:
        disk += sizes.checkpoint_bytes
    return Prediction(label, model, found.gpu_bytes, found.host_bytes, disk, found.seconds)


def preflight(root: RootConfig, runs_here: bool = True) -> Prediction:
    """The prediction with its checks. runs_here: the cell runs on this machine, whose memory, GPU and kernels count."""
    prediction = predict(root)
    if root.gemm.bench == "none":
        prediction.checks += [_model_check(root), *_data_checks(root)]
    prediction.checks.append(_disk_check(root, prediction))
    if runs_here:
        prediction.checks += [_host_check(prediction), *_gpu_checks(root, prediction)]
    return prediction


def model_config(model: ModelConfig) -> PreTrainedConfig | None:
    """The model's configuration without its weights: from its directory, the hub's cache, or the built-in sizes."""
    from odyssey.engine.shapes import known_config

    directory = TINY_PATH if model.name == "tiny" and model.path is None else model.path
    directory = directory or cached_snapshot(model)
    try:
        if directory is not None:
            return AutoConfig.from_pretrained(Path(directory).expanduser())
        return known_config(model.name)
    except (OdysseyError, OSError, ValueError, KeyError):
        return None


def cached_snapshot(model: ModelConfig) -> Path | None:
    """The model's directory in the hub's cache, None when config.json is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not model.hub_id:
        return None
    found = try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def uses_gpu(root: RootConfig) -> bool:
    """Whether the cell computes on a GPU. device=auto: when this machine has one."""
    return root.device == "cuda" or (root.device == "auto" and bool(_gpus()))


def _model_check(root: RootConfig) -> Check:
    model, name = root.model, "model"
    existing = existing_checkpoint(root.method)
    path = existing or model.path
    if path is None and model.name == "tiny":
        return Check(name, True, "embedded")
    if path is not None:
        directory = Path(path).expanduser()
        if not directory.is_dir():
            return Check(name, False, f"{path}: no such directory")
        if not (directory / "config.json").is_file():
            return Check(name, False, f"{path}: no config.json")
        try:
            CheckpointReader(directory)
        except OdysseyError as error:
            return Check(name, False, str(error))
        return Check(name, True, "local")
    if getattr(root.latency, "dummy_weights", False):
        return Check(name, True, "random weights")
    if not model.hub_id:
        return Check(name, False, "neither model.path nor model.hub_id is set")
    snapshot = cached_snapshot(model)
    if snapshot is not None and list(snapshot.glob("*.safetensors")):
        return Check(name, True, "in the hub's cache")
    return _hub_check(model.hub_id, model.revision)


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


def _data_checks(root: RootConfig) -> list[Check]:
    checks = []
    method = build_method(root.method.name, root.method)
    if method.needs_calibration and existing_checkpoint(root.method) is None:
        dataset = dataset_of(root.calibration, root.model, default="c4")
        checks.append(_corpus_check("calibration", root.calibration, dataset, "train", root.data.root))
    if root.accuracy.perplexity is not None:
        dataset = dataset_of(root.accuracy.perplexity, root.model, default="wikitext2")
        checks.append(_corpus_check("perplexity", root.accuracy.perplexity, dataset, "test", root.data.root))
    checks += [_task_check(task, root.data.root) for task in root.accuracy.tasks]
    return checks


def _corpus_check(
    name: str, group: CalibrationConfig | PerplexityConfig, dataset: str, split: str, root: str | None
) -> Check:
    if dataset == "embedded":
        return Check(name, True, "embedded")
    if dataset == "file":
        found = Path(group.path).expanduser().is_file()
        return Check(name, found, group.path if found else f"{group.path}: no such file")
    patterns = {
        "wikitext2": (f"wikitext2/wiki.{split}.raw", f"wikitext-2-raw/wiki.{split}.raw"),
        "c4": (f"c4/*{'train' if split == 'train' else 'val'}*.json*",),
    }[dataset]
    for pattern in patterns if root else ():
        if next(Path(root).expanduser().glob(pattern), None):
            return Check(name, True, f"{dataset} in data.root")
    return _hub_data_check(name, dataset)


def _task_check(task: str, root: str | None) -> Check:
    from odyssey.data.task_files import local_file_names

    names = local_file_names(task) if root else ()
    if names and all((Path(root).expanduser() / name).is_file() for name in names):
        return Check(task, True, "in data.root")
    return _hub_data_check(task, task)


def _hub_data_check(name: str, what: str) -> Check:
    if hub_reachable():
        return Check(name, True, f"{what} from the hub")
    return Check(name, None, f"{what}: not in data.root, and the hub cannot be reached; only a cached copy would do")


def _disk_check(root: RootConfig, prediction: Prediction) -> Check:
    directory = Path(root.output_dir).expanduser().absolute()
    while not directory.exists():
        directory = directory.parent
    if not os.access(directory, os.W_OK):
        return Check("disk", False, f"output_dir={root.output_dir}: cannot be written")
    free = shutil.disk_usage(directory).free
    return Check("disk", free > prediction.disk_bytes, f"{free / 2**30:.0f} GiB free")


def _host_check(prediction: Prediction) -> Check:
    free = psutil.virtual_memory().available
    return Check("host memory", free > prediction.host_bytes, f"{free / 2**30:.0f} GiB free")


@functools.cache
def _gpus() -> tuple[dict, ...]:
    """Name and total bytes of the GPUs of this machine, without a CUDA context."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    try:
        listed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
        rows = [line.split(",") for line in listed.splitlines() if line.strip()]
        return tuple(
            {"name": name.strip(), "bytes": int(mib) * 2**20, "capability": float(capability)}
            for name, mib, capability in rows
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _gpu_checks(root: RootConfig, prediction: Prediction) -> list[Check]:
    needs = root.gemm.bench != "none" or root.device == "cuda"
    if not _gpus():
        return [Check("GPU", False, "none on this machine; use device=cpu or another machine")] if needs else []
    if not (needs or uses_gpu(root)):
        return []
    gpu = min(_gpus(), key=lambda each: each["bytes"])
    fits = prediction.gpu_bytes < gpu["bytes"]
    checks = [Check("GPU", fits, f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB")]
    if root.gemm.bench != "none" or build_method(root.method.name, root.method).scheme.activation_bits == 8:
        checks.append(_kernel_check(gpu["capability"]))
    return checks


def _kernel_check(capability: float) -> Check:
    from fastgemm.build import LIBRARY_NAME, CompilerNotFoundError, cache_dir, find_nvcc

    if capability < 8:
        return Check("kernels", False, f"FastGEMM needs compute capability 8.0, this GPU has {capability}")
    named = os.environ.get("FASTGEMM_LIBRARY")
    if named:
        found = Path(named).is_file()
        return Check("kernels", found, "FASTGEMM_LIBRARY" if found else f"FASTGEMM_LIBRARY={named}: no such file")
    try:
        find_nvcc()
    except CompilerNotFoundError as error:
        built = any(cache_dir().glob(f"*/{LIBRARY_NAME}"))
        return Check("kernels", built, "built before" if built else str(error))
    return Check("kernels", True, "compiled at first use")

