"""The quantized checkpoint: a directory that is written block by block and loaded back as a model.

    config.json, tokenizer files     copied from the source (config.json without a quantization_config)
    odyssey.json                     the manifest: format, source model, recipe, scheme of every layer, sizes, metrics
    block-00000.safetensors ...      one shard per decoder block
    rest.safetensors                 embeddings, final norm, lm_head in the source's dtype
    model.safetensors.index.json     tensor name -> shard

A quantized layer `<name>` is stored as `<name>.weight_packed` (uint8, see packing.py), `<name>.weight_scale` (float32
[out, groups]), for asymmetric schemes `<name>.weight_zero` (uint8 [out, groups]), for columns that are not in the order
of the input features `<name>.weight_order` (int32 [in]), and `<name>.bias` if it has one.
A shard is finished when it has its final name: it is written under another one and renamed. Its metadata carry the
digest of the job that made it, so that a stopped job goes on at the first block that is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.models.architecture import LlamaFamily
from odyssey.models.reader import INDEX_NAME, CheckpointReader
from odyssey.quantization.linear import QuantizedLinear
from odyssey.quantization.method import BlockResult
from odyssey.quantization.packing import pack_values, unpack_values
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme

MANIFEST_NAME = "odyssey.json"
REST_NAME = "rest.safetensors"
FORMAT_VERSION = 1
_COPIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")


def shard_name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


@dataclass
class StoredBlock:
    """A finished block read back: the method's result and, for the pipeline, its metrics."""

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, torch.Tensor]
    metrics: dict


class CheckpointWriter:
    """Writes a quantized checkpoint of the job identified by `job_digest` into `directory`."""

    def __init__(self, directory: Path, job_digest: str) -> None:
        self.directory = Path(directory)
        self.job_digest = job_digest
        self.directory.mkdir(parents=True, exist_ok=True)

    def _save(self, tensors: dict[str, torch.Tensor], name: str, metadata: dict[str, str]) -> None:
        partial = self.directory / f".{name}.partial"
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"job": self.job_digest, **metadata})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(self.directory / name)

    def _metadata(self, name: str) -> dict[str, str] | None:
        """Metadata of a shard of this very job, None when it is absent, damaged or another job's."""
        path = self.directory / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        return metadata if metadata.get("job") == self.job_digest else None

    def has_block(self, index: int) -> bool:
        return self._metadata(shard_name(index)) is not None

    def write_block(self, index: int, prefix: str, result: BlockResult, kept: dict[str, torch.Tensor]) -> None:
        """Write one block. `kept` holds the tensors that no quantized layer replaces, in the source's dtype."""
        tensors, layers = {}, {}
        for name, weight in result.weights.items():
            tensors[f"{prefix}{name}.weight_packed"] = pack_values(weight.values, weight.scheme.weight_bits)
            tensors[f"{prefix}{name}.weight_scale"] = weight.scales
            if weight.zeros is not None:
                tensors[f"{prefix}{name}.weight_zero"] = weight.zeros
            if weight.order is not None:
                tensors[f"{prefix}{name}.weight_order"] = weight.order.int()
            layers[name] = {**weight.scheme.to_dict(), "in_features": weight.values.shape[1]}
        for name, tensor in kept.items():
            tensors[prefix + name] = result.tensors.get(name, tensor).to(tensor.dtype)
        metadata = {"layers": json.dumps(layers), "metrics": json.dumps(result.metrics), "prefix": prefix}
        self._save(tensors, shard_name(index), metadata)

    def read_block(self, index: int) -> StoredBlock:
        """A finished block, exactly as it was written."""
        metadata = self._metadata(shard_name(index))
        if metadata is None:
            raise InvalidCheckpointError(f"{self.directory / shard_name(index)}: not a finished block of this job")
        prefix, weights, tensors = metadata["prefix"], {}, {}
        layers = json.loads(metadata["layers"])
        with safe_open(self.directory / shard_name(index), framework="pt") as file:
            names = set(file.keys())
            for name, layer in layers.items():
                weights[name] = _read_weight(file.get_tensor, names, prefix + name, layer)
            for name in names:
                if ".weight_" not in name:
                    tensors[name.removeprefix(prefix)] = file.get_tensor(name)
        return StoredBlock(weights, tensors, json.loads(metadata["metrics"]))

    def finish(self, reader: CheckpointReader, architecture: LlamaFamily, manifest: dict) -> dict:
        """Write everything that is no block, the index, and last of all the manifest, which makes it complete."""
        rest = {
            name: reader.read(name)
            for name in (architecture.embedding_name, *architecture.final_names)
            if name in reader
        }
        self._save(rest, REST_NAME, {})
        for pattern in _COPIED:
            for file in reader.directory.glob(pattern):
                shutil.copyfile(file, self.directory / file.name)
        config = json.loads((self.directory / "config.json").read_text())
        if config.pop("quantization_config", None) is not None:
            # The layout of an imported checkpoint, which this one does not have.
            _write_json(self.directory / "config.json", config)
        shards = [shard_name(index) for index in range(architecture.num_blocks)] + [REST_NAME]
        weight_map, layers, metrics = {}, {}, []
        for shard in shards:
            with safe_open(self.directory / shard, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), shard))
                metadata = file.metadata()
            if "layers" in metadata:
                layers.update(
                    {metadata["prefix"] + name: layer for name, layer in json.loads(metadata["layers"]).items()}
                )
                metrics.append(json.loads(metadata["metrics"]))
        total = sum((self.directory / shard).stat().st_size for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(self.directory / INDEX_NAME, index)
        manifest = {
            "format": "odyssey-quantized",
            "format_version": FORMAT_VERSION,
            "job": self.job_digest,
            **manifest,
            "size": size_of(self.directory, layers),
            "layers": layers,
            "block_metrics": metrics,
        }
        _write_json(self.directory / MANIFEST_NAME, manifest)
        return manifest


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.rename(path)


def _read_weight(get, names: set[str] | CheckpointReader, name: str, layer: dict) -> QuantizedWeight:
    scheme = QuantScheme(**{key: layer[key] for key in ("weight_bits", "group_size", "symmetric", "activation_bits")})
    values = unpack_values(
        get(f"{name}.weight_packed"), scheme.weight_bits, layer["in_features"], signed=scheme.symmetric
    )
    zeros = get(f"{name}.weight_zero") if f"{name}.weight_zero" in names else None
    order = get(f"{name}.weight_order").long() if f"{name}.weight_order" in names else None
    return QuantizedWeight(values, get(f"{name}.weight_scale"), scheme, zeros, order)


def size_of(directory: Path, layers: dict[str, dict]) -> dict:
    """Bytes on disk of all shards, and bits per weight of the quantized layers (integers, scales and zero points)."""
    stored_bytes = weights = 0
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                layer_name, _, leaf = name.rpartition(".")
                if layer_name in layers and leaf.startswith("weight_"):
                    tensor = file.get_slice(name)
                    count = torch.Size(tensor.get_shape()).numel()
                    stored_bytes += count * (4 if leaf in ("weight_scale", "weight_order") else 1)
                    if leaf == "weight_packed":
                        weights += tensor.get_shape()[0] * layers[layer_name]["in_features"]
    return {
        "disk_bytes": sum(shard.stat().st_size for shard in directory.glob("*.safetensors")),
        "quantized_weights": weights,
        "bits_per_weight": 8 * stored_bytes / weights if weights else None,
    }


def read_manifest(directory: str | Path) -> dict:
    """The manifest of a finished checkpoint. Raises InvalidCheckpointError when there is none."""
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise InvalidCheckpointError(f"{directory}: no {MANIFEST_NAME}; not a finished quantized checkpoint")
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InvalidCheckpointError(
            f"{path}: not valid JSON ({error}); remove {Path(directory).name} and quantize again (force=true)"
        ) from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UnsupportedError(
            f"{path}: format version {manifest.get('format_version')}, this release reads {FORMAT_VERSION}"
        )
    return manifest


def load_quantized(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "integer",
) -> nn.Module:
    """Load a quantized checkpoint as a Transformers causal LM whose decoder linear layers hold integers.

    directory: what `quantize_checkpoint` wrote.
    dtype:     of everything that is not quantized; default float32 on CPU, the checkpoint's own on CUDA.
    backend:   "integer" (what is shipped) or "simulate" (fake quantization, for comparison).
    Raises InvalidCheckpointError or UnsupportedError, naming the file.
    """
    directory, device = Path(directory), torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device={device}: no CUDA device is visible; use device=cpu")
    manifest = read_manifest(directory)
    architecture = LlamaFamily.from_directory(directory)
    reader = CheckpointReader(directory)
    architecture.check_config(reader)
    model = architecture.empty_model()
    names = set(reader.names())
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else reader.read(architecture.embedding_name).dtype
    for name, layer in manifest["layers"].items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        has_bias = getattr(owner, leaf).bias is not None
        bias = reader.read(f"{name}.bias").to(device, dtype) if has_bias else None
        weight = _read_weight(lambda key: reader.read(key).to(device), names, name, layer)
        quantized = QuantizedLinear(weight, bias, backend)
        quantized.pack_for_kernels()
        setattr(owner, leaf, quantized)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name in names:
            _assign(model, name, reader.read(name).to(device, dtype))
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InvalidCheckpointError(f"{directory}: tensor {missing[0]} is missing from the checkpoint")
    return model.to(device)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    model.get_submodule(owner_name).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
