"""Existing GPTQ and AWQ checkpoints (`method.checkpoint=DIR`): read block by block into a checkpoint of this project.

Integers, scales and zero points are taken over as they are; from then on the checkpoint is like one quantized here.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from baselines.checkpoint_formats import (
    AWQ_BITS,
    GPTQ_BITS,
    QuantizedLayout,
    is_symmetric,
    unpack_awq,
    unpack_gptq,
)
from odyssey.errors import InvalidCheckpointError, MissingModelError, UnsupportedError
from odyssey.locking import exclusive
from odyssey.models.architecture import LlamaFamily
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import ModelSource, checkpoint_fingerprint
from odyssey.progress import Progress
from odyssey.quantization.checkpoint import MANIFEST_NAME, CheckpointWriter, read_manifest
from odyssey.quantization.method import BlockResult
from odyssey.quantization.pipeline import QuantizationReport
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme

# Files beside config.json in which earlier releases of AutoGPTQ and AutoAWQ describe the layout.
LAYOUT_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}


def checkpoint_source(name: str, directory: str) -> ModelSource:
    """The existing checkpoint as the source of a cell. Raises MissingModelError or InvalidCheckpointError."""
    path = Path(directory).expanduser().resolve()
    if not path.is_dir():
        raise MissingModelError(
            f"method.checkpoint={directory}: no such directory; give a GPTQ or AWQ checkpoint in Hugging Face layout"
        )
    return ModelSource(name, path, "local", checkpoint_fingerprint(path))


def read_layout(directory: Path, method: str) -> QuantizedLayout:
    """The layout that config.json (or the file of an earlier release) describes; `method` is "gptq" or "awq".

    Raises InvalidCheckpointError where nothing describes it, UnsupportedError for a layout that is not read.
    """
    described, file = _description(directory)
    found = str(described.get("quant_method", "awq" if "w_bit" in described else "gptq")).lower()
    if found != method:
        hint = f"use method={found}" if found in LAYOUT_FILES else "GPTQ and AWQ checkpoints are read"
        raise UnsupportedError(f"{file}: the checkpoint's quant_method is {found!r}, not {method!r}; {hint}")
    if described.get("dynamic"):
        raise UnsupportedError(f"{file}: layers with settings of their own ('dynamic') are not read")
    bits = described.get("bits", described.get("w_bit"))
    allowed = GPTQ_BITS if method == "gptq" else AWQ_BITS
    if bits not in allowed:
        raise UnsupportedError(f"{file}: bits={bits} is not read; {method}: {', '.join(map(str, allowed))}")
    group_size = described.get("group_size", described.get("q_group_size"))
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise InvalidCheckpointError(f"{file}: group_size={group_size}: must be -1 or a positive number")
    if method == "awq":
        version = str(described.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnsupportedError(f"{file}: AWQ version {version!r} is not read; only 'gemm' is")
        return QuantizedLayout("awq", bits, group_size)
    version = str(described.get("checkpoint_format", described.get("format", "gptq"))).lower()
    offsets = {"gptq": 1, "gptq_v2": 0}
    if version not in offsets:
        raise UnsupportedError(f"{file}: checkpoint_format {version!r} is not read; {', '.join(offsets)} are")
    return QuantizedLayout("gptq", bits, group_size, offsets[version])


def _description(directory: Path) -> tuple[dict, Path]:
    for file, key in [
        (directory / "config.json", "quantization_config"),
        *((directory / name, None) for name in LAYOUT_FILES.values()),
    ]:
        try:
            content = json.loads(file.read_text()) if file.is_file() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InvalidCheckpointError(f"{file}: not valid JSON ({error})") from error
        described = content.get(key) if key else content
        if described:
            return described, file
    raise InvalidCheckpointError(
        f"{directory / 'config.json'}: no quantization_config; the checkpoint is not quantized (use model.path)"
    )


class ExistingCheckpoint:
    """A GPTQ or AWQ checkpoint seen block by block.

    Opening checks that every tensor that is needed is there and has the shape that config.json asks for.
    """

    def __init__(self, directory: Path, method: str) -> None:
        self.directory = directory
        self.layout = read_layout(directory, method)
        self.reader = CheckpointReader(directory)
        self.architecture = LlamaFamily.from_directory(directory, quantized=True)
        self._layers = [self._check_block(index) for index in range(self.architecture.num_blocks)]
        if not any(self._layers):
            raise InvalidCheckpointError(f"{directory}: no tensor *.qweight of a decoder block; nothing is quantized")
        self._check_rest()
        symmetric = all(
            is_symmetric(self.reader.read(f"{self.architecture.block_prefix(index)}{name}.qzeros"), self.layout)
            for index, names in enumerate(self._layers)
            for name in names
        )
        self.scheme = QuantScheme(self.layout.bits, self.layout.group_size, symmetric, activation_bits=16)

    def _check_block(self, index: int) -> list[str]:
        """Names, relative to the block, of its quantized layers."""
        prefix, block = self.architecture.block_prefix(index), self.architecture.skeleton_block(index)
        quantized = []
        for group in self.architecture.linear_groups:
            for name in group:
                if f"{prefix}{name}.weight" in self.reader:
                    continue
                linear = block.get_submodule(name)
                for leaf, shape in self.layout.shapes(linear.out_features, linear.in_features).items():
                    tensor = f"{prefix}{name}.{leaf}"
                    if leaf == "g_idx" and tensor not in self.reader:
                        continue
                    self._check_shape(tensor, shape)
                quantized.append(name)
        replaced = {f"{name}.weight" for name in quantized}
        for name, parameter in block.named_parameters():
            if name not in replaced:
                self._check_shape(prefix + name, tuple(parameter.shape))
        return quantized

    def _check_rest(self) -> None:
        if "lm_head.qweight" in self.reader:
            raise UnsupportedError(f"{self.directory}: a quantized lm_head is not read")
        tied = self.architecture.config.tie_word_embeddings
        for name in (self.architecture.embedding_name, *self.architecture.final_names):
            if name not in self.reader and not (tied and name == "lm_head.weight"):
                raise InvalidCheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")
        self.architecture.check_config(self.reader)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        if name not in self.reader:
            raise InvalidCheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")
        found = self.reader.shape(name)
        if found != expected:
            raise InvalidCheckpointError(
                f"{self.directory}: tensor {name} has shape {found}, {expected} is expected "
                f"({self.layout.method}, {self.layout.bits} bits, group_size {self.layout.group_size})"
            )

    def read_block(self, index: int) -> tuple[BlockResult, dict[str, torch.Tensor]]:
        """The quantized layers of a block, and its other tensors by their name in the block."""
        prefix, block = self.architecture.block_prefix(index), self.architecture.skeleton_block(index)
        weights = {name: self._read_layer(prefix + name) for name in self._layers[index]}
        replaced = {f"{name}.weight" for name in weights}
        kept = {name: self.reader.read(prefix + name) for name, _ in block.named_parameters() if name not in replaced}
        for name in weights:
            bias = f"{name}.bias"
            # AutoGPTQ stores zeros as the biases of layers that have none.
            if bias not in kept and prefix + bias in self.reader and bool(self.reader.read(prefix + bias).any()):
                raise UnsupportedError(
                    f"{self.directory}: tensor {prefix + bias} is a bias that the model does not have"
                )
        return BlockResult(weights), kept

    def _read_layer(self, name: str) -> QuantizedWeight:
        names = [leaf for leaf in self.layout.tensor_names() if f"{name}.{leaf}" in self.reader]
        tensors = {leaf: self.reader.read(f"{name}.{leaf}") for leaf in names}
        for leaf, tensor in tensors.items():
            if leaf != "scales" and tensor.dtype != torch.int32:
                raise InvalidCheckpointError(f"{self.directory}: tensor {name}.{leaf} is {tensor.dtype}, not int32")
        unpack = unpack_gptq if self.layout.method == "gptq" else unpack_awq
        try:
            return unpack(tensors, self.layout, self.scheme.symmetric)
        except ValueError as error:
            raise InvalidCheckpointError(f"{self.directory}: {name}: {error}") from error


def import_checkpoint(
    source: ModelSource, method: str, settings: dict, output_dir: Path, progress: Progress | None = None
) -> QuantizationReport:
    """Write the existing checkpoint `source.path` of `method` ("gptq" or "awq") as one of this project.

    settings: JSON-ready settings of the method, for the manifest. Memory: that of one block. A second call finds the
    finished checkpoint. Raises MissingModelError, InvalidCheckpointError or UnsupportedError, one line each.
    """
    started = time.monotonic()
    progress = progress or Progress.silent()
    existing = ExistingCheckpoint(source.path, method)
    digest = import_digest(source, existing.layout)
    with exclusive(output_dir, "writing this checkpoint"):
        blocks = existing.architecture.num_blocks
        if (output_dir / MANIFEST_NAME).is_file() and read_manifest(output_dir)["job"] == digest:
            return QuantizationReport(read_manifest(output_dir), 0.0, blocks)
        writer = CheckpointWriter(output_dir, digest)
        report = QuantizationReport({}, 0.0, 0)
        with progress.task(f"quantizing {source.name} (reading {method})", blocks) as task:
            for index in range(blocks):
                if writer.has_block(index):
                    report.resumed_blocks += 1
                else:
                    result, kept = existing.read_block(index)
                    writer.write_block(index, existing.architecture.block_prefix(index), result, kept)
                task.advance()
        manifest = {
            "model": {"name": source.name, "origin": source.origin, "fingerprint": source.fingerprint},
            "method": {"name": method, **settings},
            "imported": asdict(existing.layout),
            "scheme": existing.scheme.to_dict(),
            "label": existing.scheme.label,
            "calibration": None,
            "seed": None,
        }
        report.manifest = writer.finish(existing.reader, existing.architecture, manifest)
    report.seconds = time.monotonic() - started
    return report


def import_digest(source: ModelSource, layout: QuantizedLayout) -> str:
    """Identify the integers of an imported checkpoint: same digest, same integers."""
    content = {"imported": source.fingerprint, "layout": asdict(layout)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
