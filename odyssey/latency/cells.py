"""End-to-end latency of a cell in the decode engine: its own method beside others, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from odyssey.config import LatencyConfig
from odyssey.engine import FORMATS, LinearFormat, load_weights
from odyssey.engine.shapes import known_config
from odyssey.engine.weights import RANDOM
from odyssey.errors import UnsupportedError
from odyssey.latency.ceilings import measure_ceilings
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.names import ODYSSEY
from odyssey.latency.statistics import summarize
from odyssey.latency.sweep import Bench, Case, Entry, random_entries
from odyssey.models.architecture import LlamaFamily
from odyssey.progress import Progress
from odyssey.record import OK


def dummy_config(name: str, path: str | None):
    """The configuration of a model that is timed with random weights: of a directory, of the embedded model, or by a
    published model's name. Raises UnsupportedError or InvalidCheckpointError."""
    from odyssey.models.embedded import TINY_PATH

    if path is not None:
        return LlamaFamily.from_directory(Path(path).expanduser()).config
    return LlamaFamily.from_directory(TINY_PATH).config if name == "tiny" else known_config(name)


def refuse_published_on_cpu(name: str, setting: str, asking: str = "device=cpu") -> None:
    """Random weights of a published model are gigabytes and hours on a CPU: only for who asks for the CPU by name.

    setting: the device setting that led to the CPU. asking: how the caller is asked for the CPU. Raises
    UnsupportedError for "auto".
    """
    if setting == "auto":
        raise UnsupportedError(
            f"{name}: random weights of its size take hours on a CPU, and no CUDA device is visible; "
            f"run it on a GPU, or say {asking}"
        )


def measure_cell(
    group: LatencyConfig,
    *,
    model: str,
    config,
    form: LinearFormat,
    checkpoint: Path | None,
    source: Path | None,
    device: torch.device,
    seed: int,
    progress: Progress | None = None,
) -> dict:
    """Time a method in the engine, with the formats of group.against and the peers of group.peers taking turns.

    form: of the cell's method. checkpoint: its weights; None for random ones. source: the unquantized checkpoint, for
    fp16 among group.against; the other formats there always have random integers (no time depends on their values).

    Returns JSON-ready `rows` (one for each candidate, see end_to_end.row_of; `method` is the number format), ceilings,
    the state of the GPU before the run, and for the cell's own method prefill_ms, decode_ms_per_token and total_ms as
    summaries, tokens per second, and speedup_over_reference (fp16 in the same engine, by median totals).
    Raises UnsupportedError where the method itself cannot run.
    """
    dtype = _dtype(config, checkpoint or source, device)
    own = Entry(form.name, form, (lambda: load_weights(checkpoint, device, dtype)) if checkpoint is not None else None)
    names = [name for name in group.against if name != form.name]
    entries = random_entries(config, names, group.peers, device, dtype)
    if own.load is None:
        (own,) = random_entries(config, [form.name], [], device, dtype) if form.name in FORMATS else (None,)
        if own is None:
            raise UnsupportedError(f"latency.dummy_weights=true: random weights of {form.name} are not built in")
    if source is not None:
        entries = [
            Entry(each.name, each.form, lambda: load_weights(source, device, dtype)) if _is_fp16(each) else each
            for each in entries
        ]
    monitor = GpuMonitor(device)
    before = monitor.idle_state()
    ceilings = measure_ceilings(device, dtype)
    bench = Bench(
        model, config, [own, *entries], device=device, dtype=dtype, monitor=monitor, ceilings=ceilings, seed=seed
    )
    case = Case(group.batch_size, group.input_len, group.output_len, group.warmup, group.repeats)
    rows = bench.run(case, progress)
    bench.close()
    mine = rows[0]
    if mine["outcome"] != OK:
        raise UnsupportedError(f"latency: {mine['outcome']}: {mine['reason']}")
    result = {
        "engine": ODYSSEY,
        "batch_size": group.batch_size,
        "input_len": group.input_len,
        "output_len": group.output_len,
        "warmup": group.warmup,
        "repeats": group.repeats,
        "dummy_weights": mine["weights"] == RANDOM,
        "before": before,
        "ceilings": ceilings.to_dict(),
        "rows": rows,
        **_own_figures(mine),
    }
    reference = next((row for row in rows if row["method"] == "fp16" and row["outcome"] == OK), None)
    if reference is not None and reference is not mine:
        result["speedup_over_reference"] = reference["total_ms"] / mine["total_ms"]
    return result


def _is_fp16(entry: Entry) -> bool:
    return entry.load is not None and entry.name == "fp16"


def _own_figures(row: dict) -> dict:
    samples, steps = row["samples"], row["output_len"] - 1
    phases = zip(samples["prefill_ms"], samples["total_ms"], strict=True)
    decode = [(total - prefill) / steps for prefill, total in phases] if steps else []
    return {
        "prefill_ms": summarize(samples["prefill_ms"]),
        "decode_ms_per_token": summarize(decode) if decode else None,
        "total_ms": summarize(samples["total_ms"]),
        "decode_tokens_per_s": row["decode_tokens_per_s"],
        "total_tokens_per_s": row["tokens_per_s"],
    }


def _dtype(config, directory: Path | None, device: torch.device) -> torch.dtype:
    """Of what is not quantized: float32 on CPU; on a GPU the checkpoint's own, float16 for random weights."""
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None) if directory is not None else None
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16
