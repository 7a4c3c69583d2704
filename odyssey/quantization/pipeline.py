"""The block-by-block pipeline shared by all methods.

One decoder block is in memory at a time: its weights come from the shards, the method turns its linear layers into
integers, the block is written out, and the calibration activations move on. Two chains of activations are carried: the
full-precision one, whose outputs are the method's targets, and the quantized one, which sees the blocks as they will be
shipped. A stopped run goes on at the first block that is not written: for finished blocks both chains are recomputed by
the same forward passes, so the integers are the same as without the stop.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from odyssey.data.calibration import CalibrationTokens
from odyssey.locking import exclusive
from odyssey.models.architecture import LlamaFamily
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import ModelSource
from odyssey.progress import Progress
from odyssey.quantization.activations import ActivationStore, stores_fit_in_memory
from odyssey.quantization.checkpoint import MANIFEST_NAME, CheckpointWriter, read_manifest
from odyssey.quantization.linear import replace_linears
from odyssey.quantization.method import BlockCalibration, BlockResult, Method
from odyssey.quantization.scheme import QuantizedWeight


@dataclass
class QuantizationReport:
    """What quantizing took. `resumed_blocks`: blocks that an earlier run had finished."""

    manifest: dict
    seconds: float
    resumed_blocks: int
    block_seconds: list[float] = field(default_factory=list)
    activations_on_disk: bool = False


class _Chains:
    """The full-precision and the quantized chain of calibration activations."""

    def __init__(self, calibration: CalibrationTokens, hidden_size: int, device: torch.device, spill_dir: Path) -> None:
        count, seqlen = calibration.tokens.shape
        in_memory = stores_fit_in_memory(3, count, seqlen, hidden_size)

        def store(name: str) -> ActivationStore:
            return ActivationStore(count, seqlen, hidden_size, device, None if in_memory else spill_dir / name)

        self.reference, self.quantized, self.targets = store("reference"), store("quantized"), store("targets")

    def start(self, embed, tokens: torch.Tensor) -> None:
        for index in range(len(tokens)):
            sample = embed(tokens[index : index + 1])
            self.reference[index] = sample
            self.quantized[index] = sample

    @torch.no_grad()
    def compute_targets(self, block: nn.Module, forward) -> None:
        for index in range(len(self.targets)):
            self.targets[index] = forward(block, self.reference[index])

    @torch.no_grad()
    def advance(self, quantized_block: nn.Module, forward) -> None:
        """Move both chains behind the block; the targets are the new full-precision chain."""
        for index in range(len(self.quantized)):
            self.quantized[index] = forward(quantized_block, self.quantized[index])
        self.reference, self.targets = self.targets, self.reference

    def close(self) -> None:
        for store in (self.reference, self.quantized, self.targets):
            store.close()


def job_digest(
    source: ModelSource, method: Method, method_settings: dict, calibration: CalibrationTokens | None, seed: int
) -> str:
    """Identify the integers a job makes: same digest, same integers."""
    content = {
        "model": source.fingerprint,
        "method": {"name": method.name, **method_settings},
        "calibration": calibration.digest() if calibration else None,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def quantize_checkpoint(
    source: ModelSource,
    method: Method,
    method_settings: dict,
    calibration: CalibrationTokens | None,
    output_dir: Path,
    *,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize `source` with `method` into a checkpoint directory; resumes a stopped run of the same job.

    method_settings: JSON-ready settings of the method, stored in the manifest and part of the job's identity.
    calibration:     required when `method.needs_calibration`.
    Raises InvalidCheckpointError, UnsupportedError, or ValueError when calibration is missing.
    """
    if method.needs_calibration and calibration is None:
        raise ValueError(f"method {method.name} needs calibration tokens")
    if not method.needs_calibration:
        calibration = None
    with exclusive(output_dir, "writing this checkpoint"):
        return _quantize(source, method, method_settings, calibration, output_dir, device, seed, progress)


def _quantize(
    source: ModelSource,
    method: Method,
    method_settings: dict,
    calibration: CalibrationTokens | None,
    output_dir: Path,
    device: torch.device,
    seed: int,
    progress: Progress | None,
) -> QuantizationReport:
    started = time.monotonic()
    progress = progress or Progress.silent()
    architecture = LlamaFamily.from_directory(source.path)
    reader = CheckpointReader(source.path)
    architecture.check_config(reader)
    digest = job_digest(source, method, method_settings, calibration, seed)
    writer = CheckpointWriter(output_dir, digest)
    if (output_dir / MANIFEST_NAME).is_file() and read_manifest(output_dir)["job"] == digest:
        return QuantizationReport(read_manifest(output_dir), 0.0, architecture.num_blocks)

    finished = [writer.has_block(index) for index in range(architecture.num_blocks)]
    resumed = finished.index(False) if False in finished else architecture.num_blocks
    report = QuantizationReport({}, 0.0, resumed)
    forward = architecture.block_forward(device)
    chains = None
    if calibration is not None and resumed < architecture.num_blocks:
        chains = _Chains(calibration, architecture.config.hidden_size, device, output_dir)
        report.activations_on_disk = chains.targets.on_disk
        chains.start(architecture.embedder(reader, device), calibration.tokens)

    with progress.task(f"quantizing {source.name} ({method.name})", architecture.num_blocks) as task:
        for index in range(architecture.num_blocks):
            if index < resumed and chains is None:
                task.advance()
                continue
            block_started = time.monotonic()
            block = architecture.load_block(reader, index, device)
            if chains is not None:
                chains.compute_targets(block, forward)
            if index < resumed:
                stored = writer.read_block(index)
                result = BlockResult(stored.weights, stored.tensors, stored.metrics)
            else:
                result = _quantize_block(architecture, method, block, chains, forward, device, seed, task.report)
                result.metrics["seconds"] = time.monotonic() - block_started
                writer.write_block(
                    index, architecture.block_prefix(index), result, _kept(architecture, reader, index, result)
                )
            if chains is not None and index + 1 < architecture.num_blocks:
                chains.advance(_install(architecture, reader, index, result, device), forward)
            report.block_seconds.append(time.monotonic() - block_started)
            task.advance()
    if chains is not None:
        chains.close()
    manifest = {
        "model": {"name": source.name, "origin": source.origin, "fingerprint": source.fingerprint},
        "method": {"name": method.name, **method_settings},
        "scheme": method.scheme.to_dict(),
        "label": method.scheme.label,
        "calibration": {**calibration.provenance, "tokens_sha256": calibration.digest()} if calibration else None,
        "seed": seed,
    }
    report.manifest = writer.finish(reader, architecture, manifest)
    report.seconds = time.monotonic() - started
    return report


def _quantize_block(
    architecture: LlamaFamily,
    method: Method,
    block: nn.Module,
    chains: _Chains | None,
    forward,
    device,
    seed: int,
    report,
) -> BlockResult:
    if chains is None:
        return method.quantize_block(block, None)
    calibration = BlockCalibration(
        inputs=chains.quantized,
        reference_inputs=chains.reference,
        targets=chains.targets,
        forward=forward,
        linear_groups=architecture.linear_groups,
        input_norms=architecture.input_norms,
        device=device,
        seed=seed,
        report=report,
    )
    return method.quantize_block(block, calibration)


def _kept(
    architecture: LlamaFamily, reader: CheckpointReader, index: int, result: BlockResult
) -> dict[str, torch.Tensor]:
    """Parameters of the block that stay as they are: norms, biases, linear layers that the method left out.

    Checkpoints of LLaMA and LLaMA-2 hold rotary frequencies, too, which are no parameters and follow from config.json.
    """
    prefix = architecture.block_prefix(index)
    replaced = {f"{name}.weight" for name in result.weights}
    names = (name for name, _ in architecture.skeleton_block(index).named_parameters())
    return {name: reader.read(prefix + name) for name in names if name not in replaced}


def _install(architecture: LlamaFamily, reader: CheckpointReader, index: int, result: BlockResult, device) -> nn.Module:
    """The block as it will be shipped: integers in place of the linear layers, changed tensors in the source's dtype.

    Built from the checkpoint's weights again, so that a resumed run (which has no method at work) gets the same block.
    """
    block = architecture.load_block(reader, index, device)
    # Changed tensors first: once a layer is quantized its bias is a buffer of the quantized layer.
    for name, tensor in _kept(architecture, reader, index, result).items():
        if name in result.tensors:
            block.get_parameter(name).data.copy_(result.tensors[name].to(tensor.dtype))
    replace_linears(block, {name: _moved(weight, device) for name, weight in result.weights.items()})
    return block


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    optional = {name: getattr(weight, name) for name in ("zeros", "order")}
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in optional.items()}
    return replace(weight, values=weight.values.to(device), scales=weight.scales.to(device), **moved)
