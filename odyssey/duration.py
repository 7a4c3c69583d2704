"""How long a cell takes, predicted from sizes: for planning (a batch system's limit), not for comparing."""

from __future__ import annotations

from odyssey.config import RootConfig
from odyssey.sizes import Calibration, ModelSizes, Texts

# Tokens of a request of lm-eval's tasks, the few-shot examples included.
_TASK_TOKENS, _FEWSHOT_TOKENS = 192, 768
# fp32-equivalent operations per second that the stages reach, of one core and of a data-centre GPU.
_CORE_FLOPS, _GPU_FLOPS = 4e10, 6e13
_BYTES_PER_S, _BYTES_PER_TOKEN = 2e8, 4
# A step of LWC takes at least this long, however small the block.
_STEP_SECONDS = 0.01


def _is_fewshot(root: RootConfig) -> bool:
    return bool(root.accuracy.num_fewshot) or any(task.startswith("mmlu") for task in root.accuracy.tasks)


def cell_seconds(
    root: RootConfig,
    sizes: ModelSizes,
    calibration: Calibration,
    texts: Texts,
    quantizes: bool,
    on_gpu: bool,
    cores: int,
) -> float:
    """Of a cell that quantizes (where quantizes) and measures what it is asked for."""
    rate = _GPU_FLOPS if on_gpu else _CORE_FLOPS * cores
    per_token = 2 * sizes.linear_weights
    operations = waiting = 0.0
    if quantizes:
        passes = 4.0
        method = root.method
        if method.name == "odyssey" and method.clipping == "learned":
            passes += 4 * method.lwc.epochs
            waiting = _STEP_SECONDS * method.lwc.epochs * calibration.samples * sizes.layers
        if method.name == "awq":
            passes += 25
        operations += passes * per_token * calibration.tokens
        # Hessians and their factors.
        operations += 4 * sizes.layers * sum(columns**3 for _, columns in sizes.linear_shapes)
    group = root.accuracy
    head = 2 * sizes.vocabulary * sizes.hidden
    if group.perplexity is not None:
        window = min(group.perplexity.window, sizes.positions)
        tokens = window * (group.perplexity.max_windows or max(1, texts.evaluation // (_BYTES_PER_TOKEN * window)))
        operations += tokens * (per_token + head)
    for task in group.tasks:
        items = group.limit or (15_000 if task == "mmlu" else 3_000)
        tokens = 4 * items * (_TASK_TOKENS + (_FEWSHOT_TOKENS if _is_fewshot(root) else 0))
        operations += tokens * (per_token + head)
    seconds = 20 + max(waiting, operations / rate) + 3 * sizes.checkpoint_bytes / _BYTES_PER_S
    if root.latency.engine != "none":
        seconds += (1 + max(1, len(root.latency.against))) * latency_seconds(root, sizes, on_gpu, cores)
    return seconds


def latency_seconds(root: RootConfig, sizes: ModelSizes, on_gpu: bool, cores: int) -> float:
    """Of one candidate: its preparation, and every run's prefill and steps at the memory's speed."""
    latency = root.latency
    rate = _GPU_FLOPS if on_gpu else _CORE_FLOPS * cores
    step = max(sizes.checkpoint_bytes / (1e12 if on_gpu else 1e10), 0.03 if on_gpu else 0.01)
    prefill = 2 * latency.batch_size * latency.input_len * sizes.linear_weights / rate
    return 30 + (latency.warmup + latency.repeats) * (prefill + latency.output_len * step)
