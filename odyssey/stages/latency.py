"""End-to-end latency: in the decode engine, in vLLM, or in Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from odyssey.errors import UnsupportedError
from odyssey.record import model_directory_name

if TYPE_CHECKING:
    from odyssey.cell import Cell


def time_random_weights(cell: Cell) -> None:
    """Times random weights: no checkpoint is read, none is written."""
    from odyssey.engine import DecoderShapes, format_of
    from odyssey.latency.cells import dummy_config, measure_cell, refuse_published_on_cpu
    from odyssey.methods import build_method

    config = cell.config
    name = model_directory_name(config)
    scheme = build_method(config.method.name, config.method).scheme
    cell.record["model"] = {"name": name, "origin": "random weights"}
    cell.record["method"] = {"name": config.method.name, "label": scheme.label, "scheme": scheme.to_dict()}
    if config.latency.engine == "vllm":
        _time_vllm(cell, Path(config.model.path).expanduser() if config.model.path else None)
        return
    if cell.device.type == "cpu" and config.model.path is None and config.model.name != "tiny":
        refuse_published_on_cpu(name, config.device)
    model_config = dummy_config(config.model.name, config.model.path)
    _check_length(cell, DecoderShapes.from_config(model_config).max_positions, name)
    cell.record["latency"] = measure_cell(
        config.latency, model=name, config=model_config, form=format_of(scheme), checkpoint=None, source=None,
        device=cell.device, seed=config.seed, progress=cell.progress,
    )  # fmt: skip


def time_checkpoint(cell: Cell, checkpoint: Path | None) -> None:
    """Times the cell's checkpoint in the decode engine, or in vLLM."""
    from odyssey.engine import format_of
    from odyssey.latency.cells import measure_cell
    from odyssey.models.architecture import LlamaFamily
    from odyssey.quantization.scheme import QuantScheme

    group = cell.config.latency
    _check_length(cell, cell.max_positions, cell.source.name)
    if group.engine == "vllm":
        if checkpoint is not None and cell.existing is None:
            raise UnsupportedError(
                "latency.engine=vllm: times what vLLM reads, which this project's checkpoints are not; "
                "use method=fp16, or method.checkpoint=DIR with a GPTQ or AWQ checkpoint"
            )
        _time_vllm(cell, cell.source.path)
        return
    directory = checkpoint or cell.source.path
    cell.record["latency"] = measure_cell(
        group, model=cell.source.name, config=LlamaFamily.from_directory(directory).config,
        form=format_of(QuantScheme(**cell.record["method"]["scheme"])), checkpoint=directory,
        source=cell.source.path if cell.existing is None else None, device=cell.device, seed=cell.config.seed,
        progress=cell.progress,
    )  # fmt: skip


def time_beside_reference(cell: Cell, model) -> None:
    """Times the model that is measured in Transformers, in turns with the unquantized one."""
    from odyssey.latency.transformers_engine import measure
    from odyssey.models.load import load_model

    group = cell.config.latency
    _check_length(cell, cell.max_positions, cell.source.name)
    if cell.existing is not None:
        raise UnsupportedError(
            f"method.checkpoint={cell.existing}: latency is measured beside the unquantized model, which is not "
            "there; use latency=none"
        )
    reference = None if cell.record["method"]["name"] == "fp16" else load_model(cell.source, cell.device)
    cell.record["latency"] = measure(
        model, reference,
        batch_size=group.batch_size, input_len=group.input_len, output_len=group.output_len,
        warmup=group.warmup, repeats=group.repeats, seed=cell.config.seed, progress=cell.progress,
    )  # fmt: skip


def _time_vllm(cell: Cell, directory: Path | None) -> None:
    from odyssey.latency.vllm_engine import measure_vllm, require_vllm
    from odyssey.models.architecture import LlamaFamily

    require_vllm()
    if directory is None:
        raise UnsupportedError("latency.engine=vllm: needs model.path=DIR, a directory with at least config.json")
    cell.record["latency"] = measure_vllm(
        cell.config.latency, model=model_directory_name(cell.config), directory=directory,
        vocab_size=LlamaFamily.from_directory(directory, quantized=True).config.vocab_size, device=cell.device,
        seed=cell.config.seed, progress=cell.progress,
    )  # fmt: skip


def _check_length(cell: Cell, positions: int, name: str) -> None:
    group = cell.config.latency
    if group.input_len + group.output_len > positions:
        raise UnsupportedError(
            f"latency.input_len={group.input_len} + latency.output_len={group.output_len} exceed the "
            f"{positions} positions of {name}; lower them"
        )
