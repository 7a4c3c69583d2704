"""End-to-end latency with Transformers' own modules (eager, dynamic KV cache): prefill, then greedy decoding.

Not an engine for comparing kernels (its launch overhead hides them on a GPU); it shows that a quantized model runs and
how its speed compares with the unquantized one on this very machine.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from odyssey.latency.statistics import summarize
from odyssey.progress import Progress


@torch.inference_mode()
def measure(
    model: nn.Module,
    reference: nn.Module | None,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    warmup: int,
    repeats: int,
    seed: int,
    progress: Progress | None = None,
) -> dict:
    """Time `model` and, interleaved run by run in this process, the unquantized `reference`.

    Returns JSON-ready prefill_ms (TTFT), decode_ms_per_token (TPOT; None for one token), total_ms, each a summary with
    raw samples, decode_tokens_per_s, total_tokens_per_s (generated tokens of the batch over the whole run), and with a
    reference the same under "reference" plus speedup_over_reference (ratio of median totals).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (batch_size, input_len), generator=generator).to(device)
    models = {"model": model} | ({"reference": reference} if reference is not None else {})
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with (progress or Progress.silent()).task("latency", (warmup + repeats) * len(models)) as task:
        for run in range(warmup + repeats):
            for name, candidate in models.items():
                sample = _generate(candidate, prompt, output_len)
                if run >= warmup:
                    samples[name].append(sample)
                task.advance()
    result = {
        "engine": "transformers",
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "warmup": warmup,
        "repeats": repeats,
        **_figures(samples["model"], batch_size, output_len),
    }
    if reference is not None:
        result["reference"] = _figures(samples["reference"], batch_size, output_len)
        result["speedup_over_reference"] = result["reference"]["total_ms"]["median"] / result["total_ms"]["median"]
    return result


def _figures(samples: list[tuple[float, float]], batch_size: int, output_len: int) -> dict:
    steps = output_len - 1
    total = summarize([1e3 * (prefill + decode) for prefill, decode in samples])
    per_token = summarize([1e3 * decode / steps for _, decode in samples]) if steps else None
    return {
        "prefill_ms": summarize([1e3 * prefill for prefill, _ in samples]),
        "decode_ms_per_token": per_token,
        "total_ms": total,
        "decode_tokens_per_s": 1e3 * batch_size / per_token["median"] if per_token else None,
        "total_tokens_per_s": 1e3 * batch_size * output_len / total["median"],
    }


def _generate(model: nn.Module, prompt: torch.Tensor, output_len: int) -> tuple[float, float]:
    """Seconds of the prefill (first token included) and of the remaining decode steps."""
    started = _clock(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = _clock(prompt.device)
    for _ in range(output_len - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return prefilled - started, _clock(prompt.device) - prefilled


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
