"""A linear layer of the engine in each number format, behind one interface.

`layer(x)` multiplies an input [tokens, in_features] and returns [tokens, out_features] in the model's dtype. Where
`layer.takes_int8` the input is the pair (int8 values, float32 scale of each token) that the fused norm, attention and
SiLU kernels return; elsewhere it is a tensor in the model's dtype. Every format but fp16 keeps integers and scales as
they are in the checkpoint.
"""

from __future__ import annotations

import dataclasses

import torch

import fastgemm
from fastgemm import ablation, w4a16
from fastgemm.packing import TILE_COLUMNS, TILE_ROWS, packed_shape
from odyssey.engine.formats import LinearFormat
from odyssey.engine.gemv import linear
from odyssey.errors import UnsupportedError
from odyssey.quantization.scheme import QuantizedWeight

Activation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# Random weights get about this standard deviation, as a trained model's have, and a mean of 0. With all sixteen values
# of an int4, whose mean is -0.5, what the channels have in common grows from layer to layer until float16 overflows,
# and the clock at the power limit is not that of a model's activations.
RANDOM_STD = 0.02
# Of the integers -7 .. 7 with 0 twice as frequent (the place of -8).
_INT4_STD = 4.183


class FloatLinear:
    """A weight in floating point: cuBLAS on a GPU, for a single token the kernel of gemv.py."""

    takes_int8 = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Activation) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class W8A8Linear:
    """int8 weight, one scale per output channel."""

    takes_int8 = True

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.values, self.scales, self.bias, self.dtype = values, scales, bias, dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        return fastgemm.w8a8_gemm(*x, self.values, self.scales, self.bias, self.dtype, weights_ready=True)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


class W4A8Linear:
    """int4 weight in FastGEMM's packed layout, one scale per output channel."""

    takes_int8 = True

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.packed, self.scales, self.bias, self.dtype = packed, scales, bias, dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        return fastgemm.w4a8_gemm(*x, self.packed, self.scales, self.bias, self.dtype, weights_ready=True)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


class GroupedW4A8Linear:
    """int4 weight with a scale for each group of input features: the fine-grained kernel that the paper argues
    against.

    scales: float32 [groups, out_features]. On CPU the groups are multiplied one after the other, in the same order.
    """

    takes_int8 = True

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None, dtype: torch.dtype
    ):
        if packed.is_cuda and group_size != ablation.GROUP_SIZE:
            raise UnsupportedError(f"grouped W4A8 runs on a GPU with groups of {ablation.GROUP_SIZE}, not {group_size}")
        self.packed, self.scales, self.group_size = packed, scales, group_size
        self.bias, self.dtype = bias, dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        values, token_scales = x
        if values.is_cuda:
            output = ablation.w4a8_grouped_gemm(
                values, token_scales, self.packed, self.scales, self.dtype, weights_ready=True
            )
            return output if self.bias is None else output.add_(self.bias)
        weight = fastgemm.unpack(self.packed, self.scales.shape[1], values.shape[1])
        output = torch.zeros(values.shape[0], self.scales.shape[1])
        ones = torch.ones_like(token_scales)
        for group, scale in enumerate(self.scales):
            columns = slice(group * self.group_size, (group + 1) * self.group_size)
            part = weight[:, columns].contiguous()
            output += fastgemm.w8a8_gemm(values[:, columns].contiguous(), ones, part, scale, None, torch.float32)
        output *= token_scales[:, None]
        if self.bias is not None:
            output += self.bias.float()
        return output.to(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


class W4A16Linear:
    """int4 weight with groups of scales (and zero points), activations in floating point: GPTQ and AWQ."""

    takes_int8 = False

    def __init__(self, packed: w4a16.PackedWeight, bias: torch.Tensor | None) -> None:
        self.packed, self.bias = packed, bias

    def __call__(self, x: Activation) -> torch.Tensor:
        return w4a16.gemm(x, self.packed, self.bias)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


class OrderedLinear:
    """A layer whose columns are not in the order of the input features (checkpoints with activation order)."""

    def __init__(self, layer: Linear, order: torch.Tensor) -> None:
        self._layer, self._order = layer, order
        self.takes_int8 = layer.takes_int8

    def __call__(self, x: Activation) -> torch.Tensor:
        if self.takes_int8:
            values, token_scales = x
            return self._layer((values.index_select(1, self._order), token_scales))
        return self._layer(x.index_select(1, self._order))

    @property
    def nbytes(self) -> int:
        return self._layer.nbytes + self._order.nbytes


Linear = OrderedLinear | FloatLinear | W8A8Linear | W4A8Linear | GroupedW4A8Linear | W4A16Linear


def quantized_linear(
    weight: QuantizedWeight, bias: torch.Tensor | None, form: LinearFormat, dtype: torch.dtype
) -> Linear:
    """The layer that runs `weight`, whose tensors are on the engine's device, in `form`.

    Raises UnsupportedError for sizes that the format's kernel does not take.
    """
    if weight.order is not None:
        in_order = dataclasses.replace(weight, order=None)
        return OrderedLinear(quantized_linear(in_order, bias, form, dtype), weight.order)
    out_features, in_features = weight.values.shape
    multiple = form.input_multiple() if form.takes_int8 else 1
    if form.takes_int8 and (out_features % 16 or in_features % multiple):
        raise UnsupportedError(
            f"a linear layer [{out_features}, {in_features}] does not fit {form.name}: out_features must be a multiple "
            f"of 16, in_features of {multiple}; measure this model with latency=transformers"
        )
    if form.kernel == "w8a8":
        return W8A8Linear(weight.values.contiguous(), weight.scales[:, 0].contiguous(), bias, dtype)
    if form.kernel == "w4a8":
        return W4A8Linear(fastgemm.pack(weight.values), weight.scales[:, 0].contiguous(), bias, dtype)
    if form.kernel == "w4a8-grouped":
        scales = weight.scales.t().contiguous()
        return GroupedW4A8Linear(fastgemm.pack(weight.values), scales, form.group_size, bias, dtype)
    # Weight-only kernels take unsigned values; a symmetric weight's zero point is 8.
    unsigned = weight.values if weight.zeros is not None else (weight.values + 8).view(torch.uint8)
    return W4A16Linear(w4a16.pack(unsigned, weight.scales, weight.zeros, form.group_size, dtype), bias)


def random_linear(
    form: LinearFormat,
    size: tuple[int, int],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Linear:
    """A layer of the given size (out_features, in_features) with random integers, made on `device`."""
    rows, columns = size
    bias_vector = torch.zeros(rows, dtype=dtype, device=device) if bias else None
    if form.kernel == "float":
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        return FloatLinear(weight.normal_(0, RANDOM_STD, generator=generator), bias_vector)
    integers = {"device": device, "generator": generator}
    if form.kernel == "w8a8":
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, **integers)
        return W8A8Linear(values, _constant(rows, RANDOM_STD / 73.6, device), bias_vector, dtype)
    scale = RANDOM_STD / _INT4_STD
    groups = -(-columns // form.group_size) if form.group_size > 0 else 1
    if form.takes_int8:
        if rows % TILE_ROWS or columns % TILE_COLUMNS:
            values = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, **integers)
            packed = fastgemm.pack(values.masked_fill_(values == -8, 0))
        else:
            # Without padding any byte is two valid integers.
            packed = torch.randint(0, 256, packed_shape(rows, columns), dtype=torch.uint8, **integers)
            for nibble, least in ((0xF0, 0x80), (0x0F, 0x08)):
                packed = torch.where(packed & nibble == least, packed & ~nibble & 0xFF, packed)
        if form.kernel == "w4a8":
            return W4A8Linear(packed, _constant(rows, scale, device), bias_vector, dtype)
        scales = _constant((groups, rows), scale, device)
        return GroupedW4A8Linear(packed, scales, form.group_size, bias_vector, dtype)
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, **integers)
    values.masked_fill_(values == 0, 8)  # of a zero point of 8
    scales = _constant((rows, groups), scale, device)
    return W4A16Linear(w4a16.pack(values, scales, None, form.group_size, dtype), bias_vector)


def _constant(shape, value: float, device: torch.device) -> torch.Tensor:
    return torch.full((shape,) if isinstance(shape, int) else shape, value, dtype=torch.float32, device=device)
