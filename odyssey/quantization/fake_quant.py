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

from odyssey.quantization.grid import dequantize, per_column, per_token_scales, sum_groups
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
        return functional.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )

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
        name: FakeQuantLinear.from_quantized(weight, block.get_submodule(name).bias)
        for name, weight in weights.items()
    }
    with swapped_modules(block, replacements):
        yield block


def _set_submodule(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)
