"""Integer grids: scales, rounding and dequantization of weights, per-token quantization of activations.

Pure functions on tensors; nothing here knows layers or calibration. Weights are [out_features, in_features];
a scale covers one output channel (`group_size` -1) or `group_size` consecutive input features of it, the last
group of a row being shorter where `in_features` is no multiple of the group size. Scales are float32 and all
arithmetic is float32.
"""

from __future__ import annotations

import torch

from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise ValueError naming `name` when `tensor` holds NaN or Inf (one host synchronization)."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or Inf of {tensor.numel()} values; check the model and its dtype")


def group_range(weight: torch.Tensor, group_size: int = PER_CHANNEL) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of every group, each float32 [out_features, num_groups]."""
    weight = weight.float()
    out_features, in_features = weight.shape
    if group_size == PER_CHANNEL or group_size >= in_features:
        low, high = weight.aminmax(dim=1, keepdim=True)
        return low, high
    padding = -in_features % group_size
    if padding:
        # Repeating a value of the last group changes neither of its extremes.
        weight = torch.cat([weight, weight[:, -1:].expand(-1, padding)], dim=1)
    low, high = weight.view(out_features, -1, group_size).aminmax(dim=2)
    return low, high


def per_column(scales: torch.Tensor, in_features: int, group_size: int = PER_CHANNEL) -> torch.Tensor:
    """Spread [out, num_groups] so that it broadcasts against a weight [out, in]."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(group_size, dim=1)[:, :in_features]


def sum_groups(values: torch.Tensor, group_size: int = PER_CHANNEL) -> torch.Tensor:
    """Sum of every group: [out_features, in_features] -> [out_features, num_groups]."""
    out_features, in_features = values.shape
    if group_size == PER_CHANNEL or group_size >= in_features:
        return values.sum(dim=1, keepdim=True)
    padded = torch.nn.functional.pad(values, (0, -in_features % group_size))
    return padded.view(out_features, -1, group_size).sum(dim=2)


def symmetric_scales(absmax: torch.Tensor, scheme: QuantScheme, full_range: bool = False) -> torch.Tensor:
    """absmax / (2^(b-1) - 1), the divisor of the paper (7 for 4 bits); a group of zeros gets scale 1.

    full_range: absmax / ((2^b - 1) / 2), 7.5 for 4 bits, as in AutoGPTQ and compressed-tensors: a finer grid that uses
    -2^(b-1), too, and clips +absmax by half a step.
    """
    scales = absmax.float() / (scheme.qmax + 0.5 if full_range else scheme.qmax)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def asymmetric_scales(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (float32) and zero points (uint8) of the range [min(low, 0), max(high, 0)].

    The range always holds 0, so that 0 is represented exactly and the zero point fits in `weight_bits`.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scales = (high - low) / scheme.qmax
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = torch.round(-low / scales).clamp_(0, scheme.qmax)
    return scales, zeros.to(torch.uint8)


def minmax_grid(
    weight: torch.Tensor, scheme: QuantScheme, full_range: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The unclipped grid of a weight: (scales, zeros), zeros None for a symmetric scheme.

    full_range: see `symmetric_scales`; without effect on an asymmetric scheme.
    """
    low, high = group_range(weight, scheme.group_size)
    if scheme.symmetric:
        return symmetric_scales(torch.maximum(high.abs(), low.abs()), scheme, full_range), None
    return asymmetric_scales(low, high, scheme)


def quantize_weight(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """clamp(rint(weight / scale) + zero, qmin, qmax) as int8 (symmetric) or uint8 (asymmetric) [out, in]."""
    in_features = weight.shape[1]
    values = torch.round(weight.float() / per_column(scales, in_features, scheme.group_size))
    if zeros is not None:
        values += per_column(zeros, in_features, scheme.group_size)
    values.clamp_(scheme.qmin, scheme.qmax)
    return values.to(torch.int8 if scheme.symmetric else torch.uint8)


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """(value - zero) * scale as float32 [out_features, in_features], columns in the order of the input features."""
    in_features, group_size = weight.values.shape[1], weight.scheme.group_size
    values = weight.values.float()
    if weight.zeros is not None:
        values -= per_column(weight.zeros.float(), in_features, group_size)
    values.mul_(per_column(weight.scales, in_features, group_size))
    return values if weight.order is None else torch.empty_like(values).index_copy_(1, weight.order, values)


def round_to_nearest(
    weight: torch.Tensor,
    scheme: QuantScheme,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight to the nearest point of the given grid, or of its own min/max grid when none is
    given.

    Raises ValueError when the weight is not [out, in] or holds NaN or Inf.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
    check_finite(weight, "weight")
    if scales is None:
        scales, zeros = minmax_grid(weight, scheme)
    return QuantizedWeight(quantize_weight(weight, scales, zeros, scheme), scales, scheme, zeros)


def per_token_scales(x: torch.Tensor) -> torch.Tensor:
    """absmax / 127 of every row, float32 [..., 1]; 1 for a row of zeros, NaN or Inf where the row has one."""
    absmax = x.float().abs().amax(dim=-1, keepdim=True)
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127)


def quantize_activation_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric int8: x [..., in_features] -> (int8 [..., in_features], float32 scales [..., 1]).

    scale = absmax / 127 and value = clamp(rint(x / scale), -128, 127), both IEEE float32 divisions and the
    rounding half to even. A row with NaN or Inf keeps it in its scale, so that the error shows in the layer's
    output.
    """
    scales = per_token_scales(x)
    return torch.round(x.float() / scales).clamp_(-128, 127).to(torch.int8), scales
