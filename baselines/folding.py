"""Moving a per-feature scale across two operations of a block without changing what the block computes.

x W^T = (x / s) (W diag(s))^T: what comes before a linear layer is divided by s, the layer's columns are multiplied by
it. Norm weights and biases are stored in the checkpoint's dtype, and rounding x / s there would cost accuracy before
anything is quantized. So the quotient is rounded first, and the scale that it then really has goes into the columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# A quotient that its rounding moves further than this factor (an underflow) is left undivided.
MAX_ROUNDING = 2.0


def storable_quotient(values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values / scales` rounded to numbers that float16 and bfloat16 both hold, and the scales that this means.

    values, scales: float32 of one shape, scales positive. Returns (quotient, effective scales) with
    quotient * effective scale = value up to float32 rounding, whatever 16-bit dtype the quotient is stored in.
    Effective scales are within 0.4 % of the wanted ones; where the quotient would leave the range of float16, the
    value stays as it is with scale 1; where a value is 0, so is the quotient, and the scale is the wanted one.
    """
    values, scales = values.float(), scales.float()
    quotient = (values / scales).to(torch.bfloat16).to(torch.float16).float()
    effective = values / quotient
    drift = effective / scales
    usable = torch.isfinite(effective) & (drift < MAX_ROUNDING) & (drift > 1 / MAX_ROUNDING)
    quotient = torch.where(usable, quotient, values)
    effective = torch.where(usable, effective, torch.where(values == 0, scales, torch.ones_like(scales)))
    return quotient, effective


@torch.no_grad()
def fold_into_norm(
    block: nn.Module, norm: str, consumers: Iterable[str], scales: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Divide the weight of `norm` by `scales` [features] and multiply the consumers' columns by it, in place.

    Returns the changed tensor by its parameter name, and the scales in effect (see `storable_quotient`).
    """
    parameter = block.get_submodule(norm).weight
    quotient, effective = storable_quotient(parameter, scales)
    parameter.copy_(quotient)
    for name in consumers:
        block.get_submodule(name).weight.mul_(effective)
    return {f"{norm}.weight": quotient}, effective


@torch.no_grad()
def fold_into_linear(
    block: nn.Module, producer: str, consumers: Iterable[str], scales: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Divide the rows (and bias) of linear layer `producer` by `scales` and multiply the consumers' columns by it.

    In place; whatever lies between the two must be linear in each feature by itself (attention's weighted sum of
    values, a product with the gate). Returns as `fold_into_norm`: the bias, if there is one, and the scales in effect.
    """
    layer = block.get_submodule(producer)
    changed = {}
    effective = scales.float()
    if layer.bias is not None:
        quotient, effective = storable_quotient(layer.bias, scales)
        layer.bias.copy_(quotient)
        changed[f"{producer}.bias"] = quotient
    layer.weight.div_(effective[:, None])
    for name in consumers:
        block.get_submodule(name).weight.mul_(effective)
    return changed, effective
