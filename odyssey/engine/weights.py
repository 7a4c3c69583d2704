"""A decoder's weights as the engine holds them: read from a checkpoint in Hugging Face layout, read from one of this
project's quantized checkpoints, or random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from odyssey.engine.formats import FORMATS, LinearFormat, format_of
from odyssey.engine.linear import FloatLinear, Linear, quantized_linear, random_linear
from odyssey.engine.shapes import DecoderShapes
from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.models.architecture import LlamaFamily
from odyssey.models.reader import CheckpointReader
from odyssey.quantization.checkpoint import MANIFEST_NAME, CheckpointWriter, read_manifest
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme

_QKV, _O, _GATE_UP, _DOWN = LlamaFamily.linear_groups
_NORMS = ("input_layernorm", "post_attention_layernorm")
CHECKPOINT, RANDOM = "checkpoint", "random"


@dataclass
class LayerWeights:
    """One decoder layer: two RMSNorm weights [hidden_size] and four linear layers, q/k/v and gate/up merged."""

    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    @property
    def nbytes(self) -> int:
        """Bytes of the four linear layers."""
        return sum(layer.nbytes for layer in (self.qkv, self.o, self.gate_up, self.down))


@dataclass
class DecoderWeights:
    """A decoder on one device.

    embedding: [vocab_size, hidden_size]. head: the output projection, never quantized. dtype: of everything that is not
    quantized. origin: "checkpoint" or "random".
    """

    config: PreTrainedConfig
    shapes: DecoderShapes
    format: LinearFormat
    dtype: torch.dtype
    origin: str
    embedding: torch.Tensor
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    head: FloatLinear

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, embedding and head included."""
        shared = self.head.weight.data_ptr() == self.embedding.data_ptr()
        return sum(layer.nbytes for layer in self.layers) + self.head.nbytes + (0 if shared else self.embedding.nbytes)


def load_weights(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DecoderWeights:
    """Weights of a checkpoint directory; one that has odyssey.json is quantized and runs its integers.

    dtype: default float32 on CPU, on CUDA the checkpoint's own (bfloat16 for a float32 checkpoint).
    Raises InvalidCheckpointError (files) and UnsupportedError (architecture, scheme, sizes).
    """
    directory, device = Path(directory), torch.device(device)
    architecture = LlamaFamily.from_directory(directory)
    reader = CheckpointReader(directory)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else reader.read(architecture.embedding_name).dtype
        if device.type != "cpu" and dtype == torch.float32:
            dtype = torch.bfloat16
    read = _QuantizedBlocks if (directory / MANIFEST_NAME).is_file() else _FloatBlocks
    blocks = read(directory, reader, architecture, device, dtype)
    shapes = DecoderShapes.from_config(architecture.config)

    def rest(name: str) -> torch.Tensor:
        return reader.read(name).to(device, dtype)

    embedding = rest(architecture.embedding_name)
    norm_name, head_name = architecture.final_names
    if not shapes.tied_head and head_name not in reader:
        raise InvalidCheckpointError(f"{directory}: tensor {head_name} is missing and config.json does not tie it")
    return DecoderWeights(
        config=architecture.config,
        shapes=shapes,
        format=blocks.format,
        dtype=dtype,
        origin=CHECKPOINT,
        embedding=embedding,
        layers=[blocks.layer(index) for index in range(shapes.num_layers)],
        final_norm=rest(norm_name),
        head=FloatLinear(embedding if shapes.tied_head else rest(head_name)),
    )


def checkpoint_format(directory: str | Path) -> LinearFormat:
    """The format of a checkpoint's linear layers, without reading their weights.

    Raises UnsupportedError where they have several or one that no kernel runs.
    """
    directory = Path(directory)
    if not (directory / MANIFEST_NAME).is_file():
        return FORMATS["fp16"]
    layers = read_manifest(directory)["layers"].values()
    schemes = {tuple(layer[key] for key in QuantScheme.__dataclass_fields__) for layer in layers}
    if len(schemes) != 1:
        raise UnsupportedError(f"{directory}: its layers have {len(schemes)} schemes, the engine runs only one")
    return format_of(QuantScheme(*schemes.pop()))


class _FloatBlocks:
    """Decoder layers of an unquantized checkpoint."""

    format = FORMATS["fp16"]

    def __init__(self, directory, reader: CheckpointReader, architecture: LlamaFamily, device, dtype) -> None:
        self._prefix = architecture.block_prefix
        self._read: Callable[[str], torch.Tensor] = lambda name: reader.read(name).to(device, dtype)
        self._has = reader.__contains__

    def layer(self, index: int) -> LayerWeights:
        prefix = self._prefix(index)

        def merged(names: tuple[str, ...]) -> FloatLinear:
            weight = torch.cat([self._read(f"{prefix}{name}.weight") for name in names])
            biases = [self._read(f"{prefix}{name}.bias") for name in names if self._has(f"{prefix}{name}.bias")]
            return FloatLinear(weight, torch.cat(biases) if biases else None)

        input_norm, post_norm = (self._read(f"{prefix}{name}.weight") for name in _NORMS)
        return LayerWeights(input_norm, merged(_QKV), merged(_O), post_norm, merged(_GATE_UP), merged(_DOWN))


class _QuantizedBlocks:
    """Decoder layers of a quantized checkpoint, merged from the integers of their linear layers."""

    def __init__(self, directory: Path, reader, architecture: LlamaFamily, device, dtype) -> None:
        self._blocks = CheckpointWriter(directory, read_manifest(directory)["job"])
        self._device, self._dtype = device, dtype
        self._intermediate = architecture.config.intermediate_size
        self.format = checkpoint_format(directory)

    def layer(self, index: int) -> LayerWeights:
        block = self._blocks.read_block(index)
        multiple = self.format.input_multiple()
        # Zero rows of gate and up give zeros, which meet zero columns of down: the sums stay what they are.
        intermediate = -(-self._intermediate // multiple) * multiple

        def merged(names: tuple[str, ...], rows: int | None = None, columns: int | None = None) -> Linear:
            parts = [_padded(block.weights[name], rows, columns, self._device) for name in names]
            weight = QuantizedWeight(
                torch.cat([part.values for part in parts]),
                torch.cat([part.scales for part in parts]),
                parts[0].scheme,
                None if parts[0].zeros is None else torch.cat([part.zeros for part in parts]),
                _common_order(parts, f"layer {index}: {', '.join(names)}"),
            )
            biases = [block.tensors.get(f"{name}.bias") for name in names]
            bias = None
            if biases[0] is not None:
                missing = 0 if rows is None else rows - len(biases[0])
                bias = torch.cat([F.pad(each, (0, missing)) for each in biases]).to(self._device, self._dtype)
            return quantized_linear(weight, bias, self.format, self._dtype)

        input_norm, post_norm = (block.tensors[f"{name}.weight"].to(self._device, self._dtype) for name in _NORMS)
        return LayerWeights(
            input_norm, merged(_QKV), merged(_O), post_norm,
            merged(_GATE_UP, rows=intermediate), merged(_DOWN, columns=intermediate),
        )  # fmt: skip


def _padded(weight: QuantizedWeight, rows: int | None, columns: int | None, device: torch.device) -> QuantizedWeight:
    """`weight` on `device` with zeros up to `rows` output and `columns` input features; each has the value 0."""
    out_features, in_features = weight.values.shape
    below, right = (rows or out_features) - out_features, (columns or in_features) - in_features
    order = weight.order
    if order is not None:
        order = torch.cat((order, torch.arange(in_features, in_features + right))).to(device)
    groups = weight.scheme.num_groups(in_features + right) - weight.scales.shape[1]
    zeros = weight.zeros
    return QuantizedWeight(
        F.pad(weight.values.to(device), (0, right, 0, below)).contiguous(),
        F.pad(weight.scales.to(device), (0, groups, 0, below), value=1.0),
        weight.scheme,
        None if zeros is None else F.pad(zeros.to(device), (0, groups, 0, below)),
        order,
    )


def _common_order(parts: list[QuantizedWeight], what: str) -> torch.Tensor | None:
    """The order of columns that layers share which are merged into one; None for that of the input features."""
    first = parts[0].order
    for part in parts[1:]:
        if (part.order is None) != (first is None) or (first is not None and not torch.equal(part.order, first)):
            raise UnsupportedError(f"{what} have their columns in different orders and cannot be one product")
    return first


def random_weights(
    config: PreTrainedConfig,
    form: LinearFormat,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> DecoderWeights:
    """Random weights of a model's shapes, made on the device layer by layer: for timing.

    Raises UnsupportedError for an architecture or a size that the format's kernel does not take.
    """
    device = torch.device(device)
    shapes = DecoderShapes.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    sizes = shapes.linear_sizes()
    biases = {"qkv": shapes.qkv_bias, "o": shapes.o_bias, "gate_up": shapes.mlp_bias, "down": shapes.mlp_bias}

    def ones() -> torch.Tensor:
        return torch.ones(shapes.hidden_size, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        linears = {
            name: random_linear(form, size, biases[name], dtype, device, generator) for name, size in sizes.items()
        }
        return LayerWeights(input_norm=ones(), post_norm=ones(), **linears)

    def table() -> torch.Tensor:
        empty = torch.empty(shapes.vocab_size, shapes.hidden_size, dtype=dtype, device=device)
        return empty.normal_(0, 0.02, generator=generator)

    embedding = table()
    return DecoderWeights(
        config=config,
        shapes=shapes,
        format=form,
        dtype=dtype,
        origin=RANDOM,
        embedding=embedding,
        layers=[layer() for _ in range(shapes.num_layers)],
        final_norm=ones(),
        head=FloatLinear(embedding if shapes.tied_head else table()),
    )
