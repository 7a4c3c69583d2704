"""End-to-end latency of a checkpoint in vLLM, where that is installed: fp16, and what vLLM reads quantized (W8A8, GPTQ,
AWQ in its Marlin and Machete kernels)."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch

from odyssey.config import LatencyConfig
from odyssey.errors import UnsupportedError
from odyssey.latency.candidates import Run
from odyssey.latency.end_to_end import Timing, random_prompt, row_of, time_interleaved
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.names import VLLM
from odyssey.latency.statistics import summarize
from odyssey.progress import Progress


def require_vllm() -> None:
    """Raise UnsupportedError, with what to do, where vLLM cannot be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "latency.engine=vllm: vLLM is not installed in this environment; install it (pip install vllm), "
            "or use latency=engine"
        )


class VllmCandidate:
    """vLLM's engine for offline inference. A run is two requests for every prompt: one token (the prefill), then all
    of them. A request returns when it is done, so that nothing is sampled while the GPU works."""

    problem = None

    def __init__(self, directory: Path, *, batch_size: int, max_len: int, dummy_weights: bool, seed: int) -> None:
        from vllm import LLM

        self.name = VLLM
        self._llm = LLM(
            model=str(directory), skip_tokenizer_init=True, load_format="dummy" if dummy_weights else "auto",
            max_model_len=max_len, max_num_seqs=batch_size, enable_prefix_caching=False, seed=seed,
        )  # fmt: skip
        config = self._llm.llm_engine.model_config
        # A configuration that names a quantization without its files may run unquantized: the row says what ran.
        self.facts = {
            "engine": VLLM,
            "format": str(config.quantization or "fp16"),
            "dtype": str(config.dtype).removeprefix("torch."),
            "weights": "random" if dummy_weights else "checkpoint",
            "weight_bytes": 0,
        }

    def run(self, prompt: torch.Tensor, output_len: int, monitor: GpuMonitor) -> Run:
        prompts = [{"prompt_token_ids": tokens} for tokens in prompt.tolist()]
        return Run(self._timed(prompts, 1), self._timed(prompts, output_len))

    def _timed(self, prompts: list[dict], output_len: int) -> float:
        from vllm import SamplingParams

        # min_tokens would add a logits processor to every step; without an end there is nothing that it forbids.
        options = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, options, use_tqdm=False)
        elapsed = 1e3 * (time.perf_counter() - started)
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if counts != {output_len}:
            raise UnsupportedError(f"vLLM returned {sorted(counts)} tokens where {output_len} were asked for")
        return elapsed

    def close(self) -> None:
        self._llm = None


def measure_vllm(
    group: LatencyConfig,
    *,
    model: str,
    directory: Path,
    vocab_size: int,
    device: torch.device,
    seed: int,
    progress: Progress | None = None,
) -> dict:
    """Time a checkpoint directory in vLLM; the result has the keys of `cells.measure_cell`, with one row.

    Raises UnsupportedError without vLLM or without a GPU.
    """
    require_vllm()
    if device.type != "cuda":
        raise UnsupportedError("latency.engine=vllm: needs a GPU; use latency=engine")
    monitor = GpuMonitor(device)
    before = monitor.idle_state()
    candidate = VllmCandidate(
        directory, batch_size=group.batch_size, max_len=group.input_len + group.output_len,
        dummy_weights=group.dummy_weights, seed=seed,
    )  # fmt: skip
    prompt = random_prompt(vocab_size, group.batch_size, group.input_len, seed, torch.device("cpu"))
    with (progress or Progress.silent()).task("latency vllm", group.warmup + group.repeats) as task:
        (timing,) = time_interleaved(
            [candidate], prompt, output_len=group.output_len, warmup=group.warmup, repeats=group.repeats,
            monitor=monitor, task=task,
        )  # fmt: skip
    candidate.close()
    row = _row(timing, model, group)
    return {
        "engine": VLLM,
        "batch_size": group.batch_size,
        "input_len": group.input_len,
        "output_len": group.output_len,
        "warmup": group.warmup,
        "repeats": group.repeats,
        "dummy_weights": group.dummy_weights,
        "before": before,
        "rows": [row],
        "prefill_ms": summarize(row["samples"]["prefill_ms"]),
        "total_ms": summarize(row["samples"]["total_ms"]),
        "decode_tokens_per_s": row["decode_tokens_per_s"],
        "total_tokens_per_s": row["tokens_per_s"],
    }


def _row(timing: Timing, model: str, group: LatencyConfig) -> dict:
    row = row_of(
        timing, model=model, batch_size=group.batch_size, input_len=group.input_len, output_len=group.output_len,
        floor=None,
    )  # fmt: skip
    method = f"vllm-{row['format']}"
    # The energy of a run is that of both of its requests.
    unknown = {"weight_bytes": None, "energy_j_per_token": None}
    return {**row, **unknown, "method": method, "interleaved_with": [method]}
