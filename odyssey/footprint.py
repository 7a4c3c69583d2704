"""What a cell takes, predicted from sizes: GPU memory, host memory, disk and time, before anything is loaded.

The formulas count the tensors that are alive at the widest moment of each stage; `tests/test_footprint.py` holds them
against measured peaks. Times are for planning (a batch system's limit), not for comparing.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from odyssey.config import RootConfig
from odyssey.engine.formats import FORMATS, LinearFormat, format_of
from odyssey.quantization.activations import MEMORY_SHARE
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme

# Python with torch and Transformers; with lm-eval and its data sets; with CUDA's libraries. Resident, measured.
_PROCESS_BYTES, _TASKS_BYTES, _CUDA_HOST_BYTES = 450_000_000, 500_000_000, 1_200_000_000
# A text that is tokenized in one piece, per byte (measured: 150 to 165), and one that is kept, joined and hashed.
_TOKENIZING, _JOINING = 160, 3
# Resident bytes for each byte of the activation stores; on a GPU every sample comes and goes through host memory.
_STORE_ON_CPU, _STORE_ON_GPU = 1.2, 2.5
# A CUDA context, and what the allocator leaves between blocks.
_CUDA_CONTEXT_BYTES, _FRAGMENTATION = 600_000_000, 1.1
# Tokens of a request of lm-eval's tasks, the few-shot examples included.
_TASK_TOKENS, _FEWSHOT_TOKENS = 192, 768
# fp32-equivalent operations per second that the stages reach, of one core and of a data-centre GPU.
_CORE_FLOPS, _GPU_FLOPS = 4e10, 6e13
_BYTES_PER_S, _BYTES_PER_TOKEN = 2e8, 4
# A step of LWC takes at least this long, however small the block.
_STEP_SECONDS = 0.01
_FLOAT = 4


@dataclass(frozen=True)
class ModelSizes:
    """A decoder of the LLaMA family in numbers. element_size: bytes of a stored weight."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int
    element_size: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelSizes:
        dtype = str(getattr(config, "dtype", None) or "float16").removeprefix("torch.")
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            positions=config.max_position_embeddings,
            element_size=4 if dtype == "float32" else 2,
        )

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of a block's seven linear layers."""
        attention, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (attention, self.hidden), (key_value, self.hidden), (key_value, self.hidden), (self.hidden, attention),
            (self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate),
        )  # fmt: skip

    @property
    def block_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def linear_weights(self) -> int:
        return self.layers * self.block_weights

    @property
    def largest_layer(self) -> int:
        return max(rows * columns for rows, columns in self.linear_shapes)

    @property
    def other_weights(self) -> int:
        """Embedding, head and norms."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return tables + (2 * self.layers + 1) * self.hidden

    @property
    def checkpoint_bytes(self) -> int:
        return self.element_size * (self.linear_weights + self.other_weights)


@dataclass(frozen=True)
class Texts:
    """Bytes of the texts that a cell reads; in_one_piece: tokenized as a whole, not document by document."""

    calibration: int = 0
    evaluation: int = 0
    calibration_in_one_piece: bool = True
    evaluation_in_one_piece: bool = True

    def calibration_memory(self) -> int:
        return self.calibration * (_TOKENIZING if self.calibration_in_one_piece else _JOINING)

    def evaluation_memory(self) -> int:
        return self.evaluation * (_TOKENIZING if self.evaluation_in_one_piece else _JOINING)


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
    calibration = _Calibration.of(root, sizes)
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
    seconds = _seconds(root, sizes, calibration, texts, quantizes, on_gpu, cores)
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
    return Footprint(gpu, int(host), 0, len(needs) * _latency_seconds(root, sizes, on_gpu, cores))


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


@dataclass(frozen=True)
class _Calibration:
    samples: int
    seqlen: int

    @classmethod
    def of(cls, root: RootConfig, sizes: ModelSizes) -> _Calibration:
        """Nothing for methods that are known to use none."""
        method = root.method
        unused = method.name in ("fp16", "rtn") or (
            method.name == "odyssey" and method.clipping == "none" and method.compensation == "none"
        )
        group = root.calibration
        return cls(0 if unused else group.num_samples, min(group.seqlen, sizes.positions))

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen


def _checkpoint_bytes(sizes: ModelSizes, scheme: QuantScheme) -> int:
    """Packed integers, fp32 scales, zero points, and everything else as it was stored."""
    packed = scales = 0
    for rows, columns in sizes.linear_shapes:
        bits = 4 if scheme.weight_bits <= 4 else 8
        groups = 1 if scheme.group_size == PER_CHANNEL else -(-columns // scheme.group_size)
        packed += rows * -(-columns * bits // 8)
        scales += rows * groups * (_FLOAT + (0 if scheme.symmetric else 1))
    return sizes.layers * (packed + scales) + sizes.element_size * sizes.other_weights


def _quantization_bytes(root: RootConfig, sizes: ModelSizes, calibration: _Calibration, scheme: QuantScheme) -> int:
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


def _is_fewshot(root: RootConfig) -> bool:
    return bool(root.accuracy.num_fewshot) or any(task.startswith("mmlu") for task in root.accuracy.tasks)


def _seconds(
    root: RootConfig,
    sizes: ModelSizes,
    calibration: _Calibration,
    texts: Texts,
    quantizes: bool,
    on_gpu: bool,
    cores: int,
) -> float:
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
        seconds += (1 + max(1, len(root.latency.against))) * _latency_seconds(root, sizes, on_gpu, cores)
    return seconds


def _latency_seconds(root: RootConfig, sizes: ModelSizes, on_gpu: bool, cores: int) -> float:
    """Of one candidate: its preparation, and every run's prefill and steps at the memory's speed."""
    latency = root.latency
    rate = _GPU_FLOPS if on_gpu else _CORE_FLOPS * cores
    step = max(sizes.checkpoint_bytes / (1e12 if on_gpu else 1e10), 0.03 if on_gpu else 0.01)
    prefill = 2 * latency.batch_size * latency.input_len * sizes.linear_weights / rate
    return 30 + (latency.warmup + latency.repeats) * (prefill + latency.output_len * step)
