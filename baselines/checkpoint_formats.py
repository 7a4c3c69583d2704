"""The tensor layouts of GPTQ and AWQ checkpoints on the Hugging Face hub, unpacked into `QuantizedWeight`.

GPTQ (AutoGPTQ, GPTQModel): integers packed along the input features into int32 words, least significant bits first;
with 3 bits, 32 integers fill three words. Zero points are packed the same way along the output features; version 1
stores them less 1. `g_idx` names each input feature's group.
AWQ (AutoAWQ, GEMM layout): eight 4-bit integers of neighbouring output features in a word, interleaved.
Scales are float16 [num_groups, out_features] in both and are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme

GPTQ_BITS, AWQ_BITS = (2, 3, 4, 8), (4,)
GPTQ_TENSORS, AWQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx"), ("qweight", "qzeros", "scales")
# Nibble i of an AWQ word belongs to output feature AWQ_ORDER[i] of the word's eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD = 32


@dataclass(frozen=True)
class QuantizedLayout:
    """How the quantized layers of a checkpoint are stored.

    method:      "gptq" or "awq".
    bits:        of an integer.
    group_size:  input features per scale; -1 for one scale per output channel.
    zero_offset: what was subtracted from the zero points when they were packed: 1 in version 1 of GPTQ, else 0.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int = 0

    def tensor_names(self) -> tuple[str, ...]:
        return GPTQ_TENSORS if self.method == "gptq" else AWQ_TENSORS

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, for a layer of that size."""
        groups = 1 if self.group_size == PER_CHANNEL else -(-in_features // self.group_size)
        packed_zeros = (groups, out_features * self.bits // _WORD)
        if self.method == "gptq":
            qweight = (in_features * self.bits // _WORD, out_features)
        else:
            qweight = (in_features, out_features * self.bits // _WORD)
        shapes = {"qweight": qweight, "qzeros": packed_zeros, "scales": (groups, out_features), "g_idx": (in_features,)}
        return {name: shapes[name] for name in self.tensor_names()}


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [num_words, n] -> uint8 [num_words * 32 / bits, n]: little-endian fields of `bits` along dimension 0.

    A field may straddle two words (3 bits); fields start anew every `bits` words, or every word where bits divides 32.
    """
    period = bits if _WORD % bits else 1
    per_period = period * _WORD // bits
    grouped = words.reshape(-1, period, words.shape[1])
    values = torch.empty(len(grouped), per_period, words.shape[1], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for index in range(per_period):
        word, shift = divmod(index * bits, _WORD)
        # The shift extends the sign; what it brings in lies above the field or is masked here.
        field = (grouped[:, word] >> shift) & ((1 << min(bits, _WORD - shift)) - 1)
        if shift + bits > _WORD:
            field = field | ((grouped[:, word + 1] << (_WORD - shift)) & mask)
        values[:, index] = field.to(torch.uint8)
    return values.flatten(0, 1)


def gptq_zeros(qzeros: torch.Tensor, layout: QuantizedLayout) -> torch.Tensor:
    """Packed zero points int32 [num_groups, words] -> uint8 [out_features, num_groups]."""
    if layout.zero_offset and _WORD % layout.bits == 0:
        # Version 1 is made by subtracting from whole words: adding to whole words gives back a zero point of 0, too,
        # whose borrow went into its neighbour.
        one_in_every_field = sum(1 << shift for shift in range(0, _WORD, layout.bits))
        return unpack_words((qzeros + one_in_every_field).t(), layout.bits)
    stored = unpack_words(qzeros.t(), layout.bits)
    return (stored + layout.zero_offset) & ((1 << layout.bits) - 1)


def unpack_gptq(tensors: dict[str, torch.Tensor], layout: QuantizedLayout, symmetric: bool) -> QuantizedWeight:
    """`qweight`, `qzeros`, `scales` and, if there is one, `g_idx` of a layer.

    symmetric: every zero point is 2^(bits - 1) (see `is_symmetric`), so that the integers are stored as signed ones.
    Raises ValueError where g_idx does not put `group_size` input features into every group.
    """
    values = unpack_words(tensors["qweight"], layout.bits).t()
    order = None
    if "g_idx" in tensors:
        order = _column_order(tensors["g_idx"], layout.group_size)
    if order is not None:
        values = values[:, order]
    return _weight(values, tensors["scales"], gptq_zeros(tensors["qzeros"], layout), layout, symmetric, order)


def unpack_awq(tensors: dict[str, torch.Tensor], layout: QuantizedLayout, symmetric: bool) -> QuantizedWeight:
    """`qweight`, `qzeros` and `scales` of a layer; `symmetric` as for `unpack_gptq`."""
    values = _deinterleave(tensors["qweight"], layout.bits)
    return _weight(values, tensors["scales"], _deinterleave(tensors["qzeros"], layout.bits), layout, symmetric, None)


def is_symmetric(qzeros: torch.Tensor, layout: QuantizedLayout) -> bool:
    """Whether every zero point is the middle of the range, 2^(bits - 1)."""
    zeros = gptq_zeros(qzeros, layout) if layout.method == "gptq" else _deinterleave(qzeros, layout.bits)
    return bool((zeros == 1 << (layout.bits - 1)).all())


def _weight(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    layout: QuantizedLayout,
    symmetric: bool,
    order: torch.Tensor | None,
) -> QuantizedWeight:
    scheme = QuantScheme(layout.bits, layout.group_size, symmetric, activation_bits=16)
    scales = scales.t().float().contiguous()
    if not symmetric:
        return QuantizedWeight(values.contiguous(), scales, scheme, zeros.contiguous(), order)
    signed = (values.to(torch.int16) - (1 << (layout.bits - 1))).to(torch.int8)
    return QuantizedWeight(signed.contiguous(), scales, scheme, None, order)


def _column_order(g_idx: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """Input features sorted by group, int64 [in_features]; None where they are in order already."""
    in_features = len(g_idx)
    expected = torch.arange(in_features) // (in_features if group_size == PER_CHANNEL else group_size)
    g_idx = g_idx.long().cpu()
    if torch.equal(g_idx, expected):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], expected):
        raise ValueError(f"g_idx does not put {group_size} input features into every group")
    return order


def _deinterleave(words: torch.Tensor, bits: int) -> torch.Tensor:
    """AWQ words int32 [rows, out_features / 8] -> uint8 [out_features, rows]."""
    fields = unpack_words(words.t(), bits).view(words.shape[1], len(AWQ_ORDER), -1)
    values = torch.empty_like(fields)
    values[:, list(AWQ_ORDER)] = fields
    return values.flatten(0, 1)
