"""Quantization: the cell's checkpoint, written here, found from before, or imported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from odyssey.config import dataset_of

if TYPE_CHECKING:
    from odyssey.cell import Cell


def quantize(cell: Cell) -> Path | None:
    """Write (or find) the quantized checkpoint; None for fp16, which measures the source itself."""
    from odyssey.methods import build_method, settings_dict
    from odyssey.models.reader import CheckpointReader
    from odyssey.quantization.pipeline import job_digest, quantize_checkpoint

    config = cell.config
    architecture = cell.architecture
    cell.max_positions = architecture.max_positions
    method = build_method(config.method.name, config.method)
    cell.record["method"] = {"name": method.name, "label": method.scheme.label, "scheme": method.scheme.to_dict()}
    if method.scheme.weight_bits == 16:
        reader = CheckpointReader(cell.source.path)
        dtype = reader.read(architecture.embedding_name).dtype
        cell.record["size"] = {"disk_bytes": reader.total_bytes(), "bits_per_weight": float(8 * dtype.itemsize)}
        cell.record["method"]["checkpoint_dtype"] = str(dtype).removeprefix("torch.")
        return None
    settings = settings_dict(config.method)
    checkpoints = Path(config.output_dir) / cell.source.name / "checkpoints"
    if cell.existing is not None:
        directory, report = _import(cell, method.name, settings, checkpoints)
    else:
        calibration = _calibrate(cell, architecture) if method.needs_calibration else None
        digest = job_digest(cell.source, method, settings, calibration, config.seed)
        directory = checkpoints / f"{method.name}-{digest}"
        if config.force:
            _remove(directory)
        report = quantize_checkpoint(
            cell.source, method, settings, calibration, directory,
            device=cell.device, seed=config.seed, progress=cell.progress,
        )  # fmt: skip
    cell.record["quantization"] = {
        "checkpoint": os.path.relpath(directory, config.output_dir),
        "job": report.manifest["job"],
        "seconds": report.seconds,
        "block_seconds": report.block_seconds,
        "resumed_blocks": report.resumed_blocks,
        "activations_on_disk": report.activations_on_disk,
        "calibration": report.manifest["calibration"],
        "block_metrics": report.manifest["block_metrics"],
    }
    cell.record["size"] = report.manifest["size"]
    return directory


def _import(cell: Cell, method: str, settings: dict, checkpoints: Path):
    """An existing checkpoint in place of one that is quantized here: (directory, report)."""
    from baselines.checkpoint_import import import_checkpoint

    directory = checkpoints / f"{method}-existing-{cell.source.fingerprint}"
    if cell.config.force:
        _remove(directory)
    report = import_checkpoint(cell.source, method, settings, directory, cell.progress)
    cell.record["method"].update({key: report.manifest[key] for key in ("label", "scheme")})
    return directory, report


def _calibrate(cell: Cell, architecture):
    from odyssey.data.calibration import sample_calibration
    from odyssey.data.texts import load_corpus

    group = cell.config.calibration
    dataset = dataset_of(group, cell.config.model, default="c4")
    corpus = load_corpus(dataset, "train", path=group.path, root=cell.config.data.root)
    seqlen = cell.clip_length("calibration.seqlen", group.seqlen)
    return sample_calibration(corpus, cell.tokenizer, num_samples=group.num_samples, seqlen=seqlen, seed=group.seed)


def _remove(directory: Path) -> None:
    if directory.is_dir():
        shutil.rmtree(directory)
