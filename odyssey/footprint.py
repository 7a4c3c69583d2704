"""What a cell takes, predicted from sizes: GPU memory, host memory, disk and time, before anything is loaded.

The formulas count the tensors that are alive at the widest moment of each stage; `tests/test_footprint.py` holds them
against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from odyssey.config import RootConfig
from odyssey.duration import cell_seconds, latency_seconds
from odyssey.engine.formats import FORMATS, LinearFormat, format_of
from odyssey.quantization.activations import MEMORY_SHARE
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme
from odyssey.sizes import Calibration, ModelSizes, Texts

# Python with torch and Transformers; with lm-eval and its data sets; with CUDA's libraries. Resident, measured.
_PROCESS_BYTES, _TASKS_BYTES, _CUDA_HOST_BYTES = 450_000_000, 500_000_000, 1_200_000_000
# Resident bytes for each byte of the activation stores; on a GPU every sample comes and goes through host memory.
_STORE_ON_CPU, _STORE_ON_GPU = 1.2, 2.5
# A CUDA context, and what the allocator leaves between blocks.
_CUDA_CONTEXT_BYTES, _FRAGMENTATION = 600_000_000, 1.1
_FLOAT = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes and seconds. gpu_bytes: 0 on CPU. disk_bytes: what the cell writes, temporary files included."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float


def footprint(
    root: RootConfig,
    sizes: ModelSizes,
    scheme: QuantScheme,
    *,
    texts: Texts,
    on_gpu: bool,
    cores: int,
    free_bytes: int,
) -> Footprint:
    """The footprint of one cell. free_bytes: of host memory; activations that would take too much of it go to disk."""
    if root.latency.dummy_weights:
        return _timing_footprint(root, sizes, scheme, on_gpu, cores)
    calibration = Calibration.of(root, sizes)
    stores = 3 * calibration.tokens * sizes.hidden * _FLOAT
    spilled = stores > MEMORY_SHARE * free_bytes
    quantizes = scheme.weight_bits < 16
    working = _quantization_bytes(root, sizes, calibration, scheme) if quantizes else 0
    measuring = _measuring_bytes(root, sizes, scheme, on_gpu)
    table = sizes.element_size * sizes.vocabulary * sizes.hidden
    kept = stores if quantizes and calibration.tokens and not spilled else 0
    host, gpu = _PROCESS_BYTES + (_TASKS_BYTES if root.accuracy.tasks else 0), 0
    reading = texts.calibration_memory() if calibration.tokens else 0
    if on_gpu:
        host += _CUDA_HOST_BYTES
        host += max(reading, _STORE_ON_GPU * kept + table, texts.evaluation_memory())
        host += 2 * sizes.element_size * sizes.block_weights
        gpu = int(_FRAGMENTATION * max(working, measuring)) + _CUDA_CONTEXT_BYTES
    else:
        # A float32 copy is made from shards that are mapped into memory.
        mapped = sizes.checkpoint_bytes if not quantizes else 0
        host += max(reading, working + _STORE_ON_CPU * kept + table, texts.evaluation_memory() + measuring + mapped)
    disk = _checkpoint_bytes(sizes, scheme) if quantizes else 0
    disk += stores if quantizes and calibration.tokens and spilled else 0
    seconds = cell_seconds(root, sizes, calibration, texts, quantizes, on_gpu, cores)
    return Footprint(gpu, int(host), int(disk), seconds)


def _timing_footprint(root: RootConfig, sizes: ModelSizes, scheme: QuantScheme, on_gpu: bool, cores: int) -> Footprint:
    """Of a cell that times random weights: on a GPU the largest format decides, as those that do not fit together take
    turns alone; on CPU all are held together."""
    names = [name for name in root.latency.against if name in FORMATS]
    needs = [_engine_bytes(root, sizes, form, on_gpu) for form in (format_of(scheme), *map(FORMATS.get, names))]
    host, gpu = _PROCESS_BYTES, 0
    if on_gpu:
        host, gpu = host + _CUDA_HOST_BYTES, max(needs) + _CUDA_CONTEXT_BYTES
    else:
        host += sum(needs)
    return Footprint(gpu, int(host), 0, len(needs) * latency_seconds(root, sizes, on_gpu, cores))


def _engine_bytes(root: RootConfig, sizes: ModelSizes, form: LinearFormat, on_gpu: bool) -> int:
    """Weights, KV cache and the activations of the prefill."""
    element, latency = 2 if on_gpu else _FLOAT, root.latency
    tokens = latency.batch_size * latency.input_len
    weights = sizes.layers * sum(form.weight_bytes(*shape, element) for shape in sizes.linear_shapes)
    cache = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * element
    widest = 3 * sizes.hidden + 4 * sizes.intermediate
    logits = latency.batch_size * sizes.vocabulary * (element + _FLOAT)
    cached = cache * latency.batch_size * (latency.input_len + latency.output_len)
    return int(weights + element * sizes.other_weights + cached + tokens * widest * element + logits)


def _checkpoint_bytes(sizes: ModelSizes, scheme: QuantScheme) -> int:
    """Packed integers, fp32 scales, zero points, and everything else as it was stored."""
    packed = scales = 0
    for rows, columns in sizes.linear_shapes:
        bits = 4 if scheme.weight_bits <= 4 else 8
        groups = 1 if scheme.group_size == PER_CHANNEL else -(-columns // scheme.group_size)
        packed += rows * -(-columns * bits // 8)
        scales += rows * groups * (_FLOAT + (0 if scheme.symmetric else 1))
    return sizes.layers * (packed + scales) + sizes.element_size * sizes.other_weights


def _quantization_bytes(root: RootConfig, sizes: ModelSizes, calibration: Calibration, scheme: QuantScheme) -> int:
    """On the device, at the widest moment of a block: the block, the method's own tensors, one sample's activations."""
    method, tokens = root.method, calibration.seqlen if calibration.samples else 0
    block = _FLOAT * sizes.block_weights
    layer = _FLOAT * sizes.largest_layer
    widest = max(columns for _, columns in sizes.linear_shapes)
    hessian = _FLOAT * widest**2
    forward = _FLOAT * tokens * (8 * sizes.hidden + 4 * sizes.intermediate)
    installed = block + sizes.block_weights
    own = 3 * layer
    if method.name == "gptq":
        own = 8 * hessian + 3 * layer
    elif method.name == "awq":
        searched = min(method.search_tokens, calibration.tokens)
        own = _FLOAT * searched * (sizes.hidden + sizes.intermediate) + 6 * min(layer, _FLOAT * 2**24)
    elif method.name == "smoothquant":
        own = 3 * layer + (2 * block if method.alpha_search else 0)
    elif method.name == "odyssey":
        own = _odyssey_bytes(method, sizes, tokens, block, layer, hessian)
    return block + max(installed, own) + forward


def _odyssey_bytes(method, sizes: ModelSizes, tokens: int, block: int, layer: int, hessian: int) -> int:
    parts = [3 * layer]
    if method.clipping == "learned":
        # Training keeps, for backward, several versions of every weight and the activations of one sample.
        saved = _FLOAT * tokens * (40 * sizes.hidden + 20 * sizes.intermediate)
        parts.append(6 * block + saved)
    if method.clipping == "search" or (method.clipping == "learned" and method.lwc.initialization == "search"):
        parts.append(2 * (hessian + 3 * _FLOAT * sizes.hidden**2) + 4 * layer)
    if method.compensation == "gptq":
        parts.append(8 * hessian + 3 * layer + block)
    return max(parts)


def _measuring_bytes(root: RootConfig, sizes: ModelSizes, scheme: QuantScheme, on_gpu: bool) -> int:
    """On the device: the model as it is measured, and the widest of its measurements."""
    element = sizes.element_size if on_gpu else _FLOAT
    original = element * (sizes.linear_weights + sizes.other_weights)
    model = original if scheme.weight_bits >= 16 else _quantized_bytes(sizes, scheme, element, on_gpu)
    layer = _FLOAT * sizes.largest_layer
    if scheme.weight_bits < 16:
        # Weight-only layers are dequantized as they are used; integer products on CPU pad and transpose a copy.
        model += 2 * layer
    measured = [0]
    group = root.accuracy
    if group.perplexity is not None:
        window = min(group.perplexity.window, sizes.positions)
        measured.append(_forward_bytes(sizes, 1, window, element, logits=3))
    if group.tasks:
        measured.append(_forward_bytes(sizes, 1, group.batch_tokens, element, logits=2))
    if root.latency.engine == "odyssey":
        # The engine loads the checkpoint itself when the measured model is gone.
        own = _engine_bytes(root, sizes, format_of(scheme), on_gpu)
        return max(own, model + max(measured))
    if root.latency.engine != "none":
        latency = root.latency
        length = latency.input_len + latency.output_len
        cache = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * length * latency.batch_size * element
        compared = original if scheme.weight_bits < 16 and latency.engine == "transformers" else 0
        forward = _forward_bytes(sizes, latency.batch_size, latency.input_len, element, logits=0)
        measured.append(2 * cache + compared + forward)
    return model + max(measured)


def _quantized_bytes(sizes: ModelSizes, scheme: QuantScheme, element: int, on_gpu: bool) -> int:
    """Kernels hold int4; every other path holds int8 values and fp32 scales."""
    kernels = on_gpu and scheme.weight_bits <= 4 and scheme.symmetric and scheme.group_size == PER_CHANNEL
    group = sizes.hidden if scheme.group_size == PER_CHANNEL else scheme.group_size
    weights = sizes.linear_weights * ((0.5 if kernels and scheme.activation_bits == 8 else 1) + _FLOAT / group)
    return int(weights) + element * sizes.other_weights


def _forward_bytes(sizes: ModelSizes, batch: int, tokens: int, element: int, logits: int) -> int:
    rows = batch * tokens
    hidden = rows * element * (6 * sizes.hidden + 4 * sizes.intermediate)
    return hidden + logits * rows * sizes.vocabulary * _FLOAT
