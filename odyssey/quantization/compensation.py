"""Hessian-based compensation of rounding errors without training: GPTQ (arXiv 2210.17323).

Columns of a weight are quantized in order; the error of each is spread over the columns that follow with the
inverse Hessian of the layer's squared output error, H = 2/N sum x x^T. Pure functions on tensors; the order
of layers inside a block belongs to the recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from odyssey.quantization.fake_quant import fake_quant_per_token
from odyssey.quantization.grid import check_finite, dequantize, minmax_grid
from odyssey.quantization.observation import observe_inputs
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme

MAX_DAMPING_RAISES = 6


@dataclass
class CompensationSettings:
    """GPTQ's settings.

    damping:           part of the Hessian's mean diagonal added to its diagonal.
    block_size:        columns whose errors are collected before the columns behind them are updated.
    act_order:         quantize columns by falling Hessian diagonal; group scales then come from the original weight.
    quantized_inputs:  build the Hessian from the int8 activations that the layer will see, where activation_bits is 8.
    full_range:        of a symmetric grid that is not given (see `grid.symmetric_scales`).
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    quantized_inputs: bool = True
    full_range: bool = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"gptq.damping must be positive, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"gptq.block_size must be at least 1, not {self.block_size}")


class HessianAccumulator:
    """Running H = 2/N sum x x^T over N tokens, float32 [in_features, in_features]."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu", quantized_inputs: bool = False) -> None:
        self.quantized_inputs = quantized_inputs
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in activations [..., in_features], as int8 per token if `quantized_inputs`."""
        if self.quantized_inputs:
            x = fake_quant_per_token(x)
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[0] == 0:
            return
        total = self.tokens + rows.shape[0]
        self.hessian.addmm_(rows.t(), rows, beta=self.tokens / total, alpha=2.0 / total)
        self.tokens = total


def collect_hessians(
    block: nn.Module,
    names: Iterable[str],
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    inputs: Iterable[torch.Tensor],
    quantized_inputs: bool,
) -> dict[str, torch.Tensor]:
    """Hessians of the inputs of the named layers over one pass of `inputs` through `block`.

    quantized_inputs: quantize the activations to int8 per token first. Every pass ends at the last layer in
    the order of execution among `names`. Raises ValueError, naming the layer, when its activations hold NaN
    or Inf.
    """
    accumulators = {}
    for name in names:
        layer = block.get_submodule(name)
        accumulators[name] = HessianAccumulator(layer.in_features, layer.weight.device, quantized_inputs)
    observe_inputs(block, {name: [accumulator] for name, accumulator in accumulators.items()}, forward, inputs)
    for name, accumulator in accumulators.items():
        check_finite(accumulator.hessian, f"the activations of {name}")
    return {name: accumulator.hessian for name, accumulator in accumulators.items()}


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the damped inverse Hessian (H^-1 = U^T U) and the damping that was used.

    `damping` times the mean diagonal is added to the diagonal; where the factorization fails it is raised
    tenfold, and ValueError is raised after six raises.
    """
    mean = hessian.diagonal().mean()
    used = damping
    for _ in range(MAX_DAMPING_RAISES + 1):
        damped = hessian.clone()
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, used
        used *= 10
    raise ValueError(f"the Hessian is not positive definite, even with damping {used / 10:g}")


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: QuantScheme,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    settings: CompensationSettings | None = None,
) -> tuple[QuantizedWeight, dict]:
    """Quantize a weight [out, in] so that its output error on the Hessian's inputs is small.

    scales, zeros:  a fixed grid [out, num_groups]. Without one, the min/max grid of the weight is used; with
                    groups, each group's grid is taken when its first column is reached, from the weight as
                    updated by then (from the original weight with act_order).
    Input features that are 0 in all of the calibration data (dead) get weight 0.

    Returns the integers and metrics: damping (used), dead_columns, loss (GPTQ's: sum of (w - q)^2 / (2
    U_jj^2), with U of `inverse_factor`) and relative_error (of the layer's output on the calibration data:
    tr(E H E^T) / tr(W H W^T) with E = W - Q). Raises ValueError for NaN or Inf and for shapes that do not
    fit.
    """
    settings = settings or CompensationSettings()
    out_features, in_features = weight.shape
    if hessian.shape != (in_features, in_features):
        raise ValueError(f"the Hessian has shape {tuple(hessian.shape)}, the weight {in_features} input features")
    check_finite(weight, "weight")
    check_finite(hessian, "Hessian")
    original = weight.float()
    hessian = hessian.float()

    # A dead column has no correlation with others: any positive diagonal does, and the mean of the live ones leaves
    # the damping what it would be without it.
    dead = hessian.diagonal() == 0
    damped = hessian.clone()
    live_mean = hessian.diagonal().sum() / (~dead).sum().clamp(min=1)
    damped.diagonal()[dead] = torch.where(live_mean > 0, live_mean, 1.0)
    work = original.masked_fill(dead, 0.0)

    per_group = scales is None and scheme.group_size != PER_CHANNEL and not settings.act_order
    if scales is None:
        scales, zeros = minmax_grid(work, scheme, settings.full_range)
    scales = scales.clone()
    zeros = None if zeros is None else zeros.clone()
    group_of = torch.arange(in_features, device=work.device)
    group_of = group_of // (in_features if scheme.group_size == PER_CHANNEL else scheme.group_size)

    order = None
    if settings.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        work, damped, group_of = work[:, order], damped[order][:, order], group_of[order]
    factor, damping = inverse_factor(damped, settings.damping)
    groups = group_of.tolist()

    values = torch.empty_like(work)
    losses = torch.zeros(out_features, device=work.device)
    for start, end in _column_blocks(in_features, scheme.group_size if per_group else None, settings.block_size):
        errors = torch.empty(out_features, end - start, device=work.device)
        for column in range(start, end):
            group = groups[column]
            if per_group and column % scheme.group_size == 0:
                part = work[:, column : min(column + scheme.group_size, in_features)]
                group_scales, group_zeros = minmax_grid(part, _per_channel(scheme), settings.full_range)
                scales[:, group] = group_scales[:, 0]
                if zeros is not None:
                    zeros[:, group] = group_zeros[:, 0]
            w, scale = work[:, column], scales[:, group]
            zero = 0.0 if zeros is None else zeros[:, group].float()
            q = torch.round(w / scale).add_(zero).clamp_(scheme.qmin, scheme.qmax)
            values[:, column] = q
            error = (w - (q - zero) * scale) / factor[column, column]
            losses += error.square()
            errors[:, column - start] = error
            if column + 1 < end:
                work[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
        if end < in_features:
            work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)

    if order is not None:
        values = values[:, torch.argsort(order)]
    quantized = QuantizedWeight(values.to(torch.int8 if scheme.symmetric else torch.uint8), scales, scheme, zeros)
    metrics = {
        "damping": damping,
        "dead_columns": int(dead.sum()),
        "loss": float(losses.double().sum()) / 2,
        "relative_error": relative_output_error(original, quantized, hessian),
    }
    return quantized, metrics


def relative_output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), E = W - Q: squared error of the layer's output over its squared output."""
    error = weight.float() - dequantize(quantized)
    numerator = ((error @ hessian) * error).double().sum()
    denominator = ((weight.float() @ hessian) * weight.float()).double().sum()
    return float(numerator / denominator) if float(denominator) > 0 else 0.0


def _per_channel(scheme: QuantScheme) -> QuantScheme:
    return QuantScheme(scheme.weight_bits, PER_CHANNEL, scheme.symmetric, scheme.activation_bits)


def _column_blocks(in_features: int, group_size: int | None, block_size: int) -> Iterator[tuple[int, int]]:
    """Column ranges of at most `block_size` (or a group's) columns that no group straddles.

    A group whose grid comes from the updated weight must see every earlier column's update: a range holds
    whole groups or lies inside one group, so that at a group's first column all of its columns are up to
    date.
    """
    if group_size is None:
        edges = range(0, in_features, block_size)
    elif group_size <= block_size:
        edges = range(0, in_features, block_size // group_size * group_size)
    else:
        edges = [
            start
            for group in range(0, in_features, group_size)
            for start in range(group, min(group + group_size, in_features), block_size)
        ]
    starts = list(edges)
    yield from zip(starts, [*starts[1:], in_features], strict=True)
