"""A quantized linear layer: integers, scales, a scheme, and the arithmetic that the scheme calls for."""

from __future__ import annotations

import torch
from torch import nn

import fastgemm
from odyssey.quantization.grid import dequantize, quantize_activation_per_token
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme

BACKENDS = ("integer", "simulate")
# FastGEMM takes output features in multiples of 16 and input features in multiples of 32.
ROW_MULTIPLE, COLUMN_MULTIPLE = 16, 32


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W held as integers.

    backend "integer" (default): per-token int8 activations times the integer weights with int32 accumulation; on a CUDA
    device FastGEMM on packed int4, on CPU the same product on int8. Layers with floating-point activations
    (activation_bits 16) multiply by the dequantized weight, which is what weight-only kernels compute.
    backend "simulate": fake quantization in float32, the reference that the integer arithmetic is compared with.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None, backend: str = "integer") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
        self.scheme: QuantScheme = weight.scheme
        self.out_features, self.in_features = weight.values.shape
        self.backend = backend
        self.register_buffer("values", weight.values.contiguous())
        self.register_buffer("scales", weight.scales.contiguous())
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("order", weight.order)
        self.register_buffer("bias", bias)
        self.register_buffer("packed", None)

    def weight(self) -> QuantizedWeight:
        """The integers, whatever layout the layer holds them in."""
        values = self.values
        if values is None:
            rows, columns = _padded(self.out_features, ROW_MULTIPLE), _padded(self.in_features, COLUMN_MULTIPLE)
            values = fastgemm.unpack(self.packed, rows, columns)[: self.out_features, : self.in_features]
        return QuantizedWeight(values, self.scales, self.scheme, self.zeros, self.order)

    def _held_values(self) -> torch.Tensor:
        """weight().values without its checks, which cost a small layer on a CPU as much as its product."""
        return self.weight().values if self.values is None else self.values

    def dequantized(self) -> torch.Tensor:
        """float32 [out_features, in_features]."""
        return dequantize(self.weight())

    def _uses_integers(self) -> bool:
        return self.scheme.activation_bits == 8 and self.scheme.symmetric and self.backend == "integer"

    def pack_for_kernels(self) -> bool:
        """On a CUDA device, hold the values in FastGEMM's packed int4 layout if that kernel computes this layer.

        Returns whether the layer is packed; calling it again changes nothing.
        """
        kernel_applies = (
            self._uses_integers() and self.scheme.weight_bits <= 4 and self.scheme.group_size == PER_CHANNEL
        )
        if self.packed is None and kernel_applies and self.scales.is_cuda:
            self.packed = fastgemm.pack(_pad_rows(_pad_columns(self.values)))
            self.values = None
        return self.packed is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] floating point -> [..., out_features] in x's dtype."""
        tokens = x.reshape(-1, self.in_features)
        if not self._uses_integers():
            output = self._simulated(tokens)
        else:
            per_channel = self.scheme.group_size == PER_CHANNEL
            ordered = tokens if self.order is None else tokens[:, self.order]
            output = self._integer_per_channel(ordered) if per_channel else self._integer_per_group(ordered)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _integer_per_channel(self, tokens: torch.Tensor) -> torch.Tensor:
        quantized, token_scales = fastgemm.quantize_per_token(tokens.contiguous())
        channel_scales = self.scales[:, 0]
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        if not (tokens.is_cuda and self.pack_for_kernels()):
            return _w8a8(quantized, token_scales, self._held_values(), channel_scales, bias, tokens.dtype)
        output = fastgemm.w4a8_gemm(
            _pad_columns(quantized), token_scales, self.packed, _pad_rows(channel_scales),
            None if bias is None else _pad_rows(bias), tokens.dtype,
        )  # fmt: skip
        return output[:, : self.out_features]

    def _integer_per_group(self, tokens: torch.Tensor) -> torch.Tensor:
        quantized, token_scales = fastgemm.quantize_per_token(tokens.contiguous())
        values, size = self._held_values(), self.scheme.group_size
        output = torch.zeros(tokens.shape[0], self.out_features, device=tokens.device)
        ones = torch.ones_like(token_scales)
        for group, start in enumerate(range(0, self.in_features, size)):
            columns = slice(start, start + size)
            output += _w8a8(quantized[:, columns], ones, values[:, columns], self.scales[:, group], None, torch.float32)
        output *= token_scales[:, None]
        if self.bias is not None:
            output += self.bias.float()
        return output.to(tokens.dtype)

    def _simulated(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.scheme.activation_bits == 8:
            quantized, token_scales = quantize_activation_per_token(tokens)
            output = nn.functional.linear(quantized.float() * token_scales, self.dequantized())
            if self.bias is not None:
                output = output + self.bias.float()
            return output.to(tokens.dtype)
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        return nn.functional.linear(tokens, self.dequantized().to(tokens.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, backend={self.backend}"


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros behind the first dimension up to the kernels' multiple; the tensor itself where nothing is missing."""
    missing = _padded(tensor.shape[0], ROW_MULTIPLE) - tensor.shape[0]
    padding = (0,) * (2 * tensor.dim() - 1) + (missing,)
    return nn.functional.pad(tensor, padding) if missing else tensor.contiguous()


def _pad_columns(tensor: torch.Tensor) -> torch.Tensor:
    missing = _padded(tensor.shape[1], COLUMN_MULTIPLE) - tensor.shape[1]
    return nn.functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()


def _w8a8(x, x_scale, values, scales, bias, dtype: torch.dtype) -> torch.Tensor:
    """fastgemm.w8a8_gemm for any shape: layers of odd sizes are padded with zeros, which change no sum."""
    output = fastgemm.w8a8_gemm(
        _pad_columns(x), x_scale, _pad_rows(_pad_columns(values)), _pad_rows(scales),
        None if bias is None else _pad_rows(bias), dtype,
    )  # fmt: skip
    return output[:, : values.shape[0]]


def replace_linears(block: nn.Module, weights: dict[str, QuantizedWeight], backend: str = "integer") -> None:
    """Put quantized layers in place of the named linear layers of a block (their biases are kept)."""
    for name, weight in weights.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = block.get_submodule(owner_name)
        bias = getattr(owner, leaf).bias
        setattr(owner, leaf, QuantizedLinear(weight, None if bias is None else bias.detach(), backend))
