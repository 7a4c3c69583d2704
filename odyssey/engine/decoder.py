"""The decoder's two passes: a chunk of prompts (prefill, "context decoding") and one token of every sequence (decoding,
"self-decoding").

Between two linear layers there is exactly one fused kernel, for every number format the same one; where the next layer
takes int8 it also quantizes per token. A decoder layer in decoding is therefore

    norm -> QKV -> attention (RoPE, cache write, attention, in two kernels) -> o -> norm -> gate/up -> SiLU -> down

with the residual added inside the norms.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import fastgemm
from odyssey.engine.attention import prefill_attention
from odyssey.engine.cache import KeyValueCache
from odyssey.engine.linear import Activation
from odyssey.engine.shapes import rope_table
from odyssey.engine.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True)
class Segment:
    """`count` tokens of the prompt in cache row `row`, from position `start` on. last: they end the prompt."""

    row: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Chunk:
    """Segments that go through the decoder together, their tokens packed one after the other, with what the kernels
    need of them on the device: positions and rows int32 [tokens], ends int64 (the last token of each prompt that ends
    here)."""

    segments: tuple[Segment, ...]
    positions: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, segments: tuple[Segment, ...], device: torch.device) -> Chunk:
        positions = [torch.arange(each.start, each.start + each.count, dtype=torch.int32) for each in segments]
        rows = [torch.full((each.count,), each.row, dtype=torch.int32) for each in segments]
        behind = itertools.accumulate(each.count for each in segments)
        ends = [end - 1 for end, each in zip(behind, segments, strict=True) if each.last]
        return cls(
            segments,
            torch.cat(positions).to(device),
            torch.cat(rows).to(device),
            torch.tensor(ends, dtype=torch.int64, device=device),
        )


class Decoder:
    """A decoder over a cache. Nothing here synchronizes with the host: both passes can be captured in CUDA graphs."""

    def __init__(self, weights: DecoderWeights, cache: KeyValueCache) -> None:
        self.weights, self.cache = weights, cache
        self._shapes = weights.shapes
        self._cos_sin = rope_table(weights.config, cache.max_len, weights.device)

    def prefill(self, tokens: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """tokens int64 [tokens of the chunk] -> logits [prompts that end here, vocab_size]; fills the cache.

        Behind the last layer's attention only the ends are computed: no other token is read any more.
        """
        shapes, cache = self._shapes, self.cache
        hidden, residual = F.embedding(tokens, self.weights.embedding), None
        last = len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            x, residual = self._norm(hidden, residual, layer.input_norm, layer.qkv.takes_int8)
            queries = fastgemm.rope_append(
                layer.qkv(x), self._cos_sin, chunk.positions, chunk.rows,
                cache.keys[index], cache.values[index], shapes.num_heads,
            )  # fmt: skip
            if index == last and not len(chunk.ends):
                return hidden.new_empty(0, shapes.vocab_size)
            attended = prefill_attention(
                queries, cache.keys[index], cache.values[index], chunk.segments, shapes.windows[index]
            )
            if index == last:
                attended, residual = attended[chunk.ends], residual[chunk.ends]
            if layer.o.takes_int8:
                attended = fastgemm.quantize_per_token(attended)
            hidden, residual = self._feed_forward(layer, layer.o(attended), residual)
        return self._logits(hidden, residual)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [B], the newest of the first B sequences of the cache -> logits [B, vocab_size].

        Token b sits at position lengths[b]; its key and value are written there. The caller advances the lengths.
        """
        shapes, cache, count = self._shapes, self.cache, tokens.shape[0]
        lengths = cache.lengths[:count]
        hidden, residual = F.embedding(tokens, self.weights.embedding), None
        for index, layer in enumerate(self.weights.layers):
            x, residual = self._norm(hidden, residual, layer.input_norm, layer.qkv.takes_int8)
            attention = fastgemm.decode_attention_quant if layer.o.takes_int8 else fastgemm.decode_attention
            # cache_ready: a layer's cache was last written before this step's embedding, which waits for everything.
            attended = attention(
                layer.qkv(x), self._cos_sin, lengths, cache.keys[index][:count], cache.values[index][:count],
                shapes.num_heads, window=shapes.windows[index], cache_ready=True,
            )  # fmt: skip
            hidden, residual = self._feed_forward(layer, layer.o(attended), residual)
        return self._logits(hidden, residual)

    def _feed_forward(
        self, layer: LayerWeights, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self._norm(hidden, residual, layer.post_norm, layer.gate_up.takes_int8)
        gate_up = layer.gate_up(x)
        product = fastgemm.silu_mul_quant(gate_up) if layer.down.takes_int8 else fastgemm.silu_mul(gate_up)
        return layer.down(product), residual

    def _norm(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quantize: bool
    ) -> tuple[Activation, torch.Tensor]:
        """RMSNorm of hidden + residual, quantized per token where asked; and that sum, the next residual."""
        eps = self._shapes.rms_eps
        if quantize:
            values, scales, total = fastgemm.rms_norm_quant(hidden, weight, eps, residual)
            return (values, scales), total
        return fastgemm.rms_norm(hidden, weight, eps, residual)

    def _logits(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normed, _ = self._norm(hidden, residual, self.weights.final_norm, quantize=False)
        return self.weights.head(normed)
