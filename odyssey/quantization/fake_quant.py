"""Simulated quantization in float32 with straight-through gradients.

The simulation is the reference that integer kernels are compared with: a `FakeQuantLinear` made from a
layer's integers computes, in float32, what the integer GEMM computes exactly. The straight-through functions
let gradients pass the rounding unchanged (arXiv 2308.13137, section 3), which learned weight clipping needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from odyssey.quantization.grid import (
    dequantize,
    per_column,
    per_token_scales,
    quantize_activation_per_token,
    sum_groups,
)
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme


class _FakeQuantPerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        scales = per_token_scales(x)
        return torch.round(x.float() / scales).clamp_(-128, 127).mul_(scales).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # No value is clamped (the scale is the row's absmax / 127), so the estimator is the identity.
        return grad


class _FakeQuantWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, scales: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        columns = per_column(scales, weight.shape[1], scheme.group_size)
        values = torch.round(weight / columns).clamp_(scheme.qmin, scheme.qmax)
        ctx.save_for_backward(weight, scales)
        ctx.scheme = scheme
        return values.mul_(columns)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weight, scales = ctx.saved_tensors
        scheme = ctx.scheme
        ratio = weight / per_column(scales, weight.shape[1], scheme.group_size)
        rounded = torch.round(ratio)
        inside = (rounded >= scheme.qmin) & (rounded <= scheme.qmax)
        grad_weight = grad * inside if ctx.needs_input_grad[0] else None
        grad_scales = None
        if ctx.needs_input_grad[1]:
            # d(scale * clamp(round(w / scale))) / d(scale): q - w / scale inside the range, q where it is
            # clamped.
            slope = rounded.clamp_(scheme.qmin, scheme.qmax).sub_(ratio.mul_(inside))
            grad_scales = sum_groups(slope.mul_(grad), scheme.group_size)
        return grad_weight, grad_scales, None


def fake_quant_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round activations to int8 per token and back (same dtype); the gradient passes unchanged."""
    return _FakeQuantPerToken.apply(x)


def fake_quant_weight(weight: torch.Tensor, scales: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Round a float32 weight [out, in] to the symmetric grid of `scales` [out, num_groups] and back.

    Differentiable in both arguments with straight-through rounding: values outside the range give the weight
    no gradient and the scale their clamped integer.
    """
    if not scheme.symmetric:
        raise ValueError("fake_quant_weight is for symmetric schemes")
    return _FakeQuantWeight.apply(weight, scales, scheme)


class _Int8Linear(torch.autograd.Function):
    """int8 per-token x @ (per-channel integers of weight / scales)^T, differentiable in x and the scales.

    Forward is the deployed arithmetic (exact integer product, then both scales); backward is that of
    linear(fake_quant_per_token(x), fake_quant_weight(weight, scales)).
    """

    @staticmethod
    def forward(ctx, x, weight, scales, bias, scheme, tf32):
        x_values, x_scales = quantize_activation_per_token(x.reshape(-1, x.shape[-1]))
        ratio = weight / scales
        rounded = torch.round(ratio)
        clamped = rounded.clamp(scheme.qmin, scheme.qmax)
        values = clamped.to(torch.int8)
        y = _int8_product(x_values, values).mul_(x_scales).mul_(scales.t())
        if bias is not None:
            y += bias
        slope = None
        if ctx.needs_input_grad[2]:
            # As in fake_quant: q - w / scale inside the range, q where the integer is clamped.
            slope = torch.where(rounded == clamped, clamped - ratio, clamped)
        ctx.save_for_backward(x_values, x_scales, values, scales, slope)
        ctx.tf32 = tf32
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x_values, x_scales, values, scales, slope = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_scales = None
        with _tf32_products(ctx.tf32 and grad.is_cuda):
            if ctx.needs_input_grad[0]:
                grad_x = (rows @ (values * scales)).view(*grad.shape[:-1], -1)
            if ctx.needs_input_grad[2]:
                grad_weight = rows.t() @ (x_values * x_scales)
                grad_scales = grad_weight.mul_(slope).sum(dim=1, keepdim=True)
        return grad_x, None, grad_scales, None, None, None


def _int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact x [m, k] @ weight [n, k]^T of int8 tensors as float32."""
    m, k = x.shape
    if x.device.type == "cpu" or (x.is_cuda and m > 16 and k % 8 == 0 and weight.shape[0] % 8 == 0):
        return torch._int_mm(x, weight.t()).float()
    return x.float() @ weight.float().t()


@contextmanager
def _tf32_products(enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: QuantScheme,
    tf32_gradients: bool = False,
) -> torch.Tensor:
    """linear(fake_quant_per_token(x), fake_quant_weight(weight, scales), bias), multiplied as integers.

    The product is exact in int32 and scaled afterwards, as in the deployed layer, and several times faster than in
    float32. Differentiable in x and scales, with the gradients of the two fake-quantization functions.
    scales: float32 [out, 1], per channel. tf32_gradients: multiply gradients in TF32 on CUDA.
    """
    return _Int8Linear.apply(x, weight, scales, bias, scheme, tf32_gradients)


class FakeQuantLinear(nn.Module):
    """A linear layer with simulated quantization: linear(fake_quant(x), weight, bias) in float32.

    weight:           float32 [out, in], already on its grid (see `from_quantized`), or the full-precision
                      weight where only the activations are to be quantized.
    activation_bits:  8 for per-token dynamic int8 inputs, 16 for inputs as they are.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation_bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> FakeQuantLinear:
        return cls(dequantize(weight), bias, weight.scheme.activation_bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_bits == 8:
            x = fake_quant_per_token(x)
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation_bits={self.activation_bits}"


@contextmanager
def swapped_modules(block: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put `replacements` (name relative to `block` -> module) in place of the block's own, and restore them
    after.

    Raises AttributeError when the block has no submodule of such a name.
    """
    originals = {name: block.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            _set_submodule(block, name, module)
        yield block
    finally:
        for name, module in originals.items():
            _set_submodule(block, name, module)


@contextmanager
def fake_quantized(block: nn.Module, weights: Mapping[str, QuantizedWeight]) -> Iterator[nn.Module]:
    """Run `block` with the named linear layers replaced by the simulation of their integers."""
    replacements = {
        name: FakeQuantLinear.from_quantized(weight, block.get_submodule(name).bias) for name, weight in weights.items()
    }
    with swapped_modules(block, replacements):
        yield block


def _set_submodule(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)
