"""Activation outliers with an unchanged full-precision function, as large language models have them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import torch
from torch import nn

# Norm of a Llama-family block -> the linear layers that read its output.
CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def inject_activation_outliers(
    model: nn.Module | MutableMapping[str, torch.Tensor], channels: Iterable[int], factor: float = 30.0
) -> list[str]:
    """Scale `channels` of every block's norms by `factor` and the columns of the layers behind them by 1 /
    factor.

    Works in place on a Llama-family model (or one decoder block), or on its state dict. In exact arithmetic
    the model computes the same function, while the inputs of q, k, v, gate and up get channels `factor` times
    larger.

    Returns the names of the changed tensors. Raises ValueError when there is no norm of that kind.
    """
    tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    index = torch.tensor(sorted(channels))
    changed = []
    for norm, consumers in CONSUMERS.items():
        suffix = f"{norm}.weight"
        for name in [name for name in tensors if name.endswith(suffix)]:
            prefix = name.removesuffix(suffix)
            tensors[name][index] *= factor
            changed.append(name)
            for consumer in consumers:
                tensors[f"{prefix}{consumer}.weight"][:, index] /= factor
                changed.append(f"{prefix}{consumer}.weight")
    if not changed:
        raise ValueError("no input_layernorm or post_attention_layernorm among the model's tensors")
    return changed
