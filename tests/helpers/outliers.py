"""Activation outliers with an unchanged full-precision function, as large language models have them.

    python tests/helpers/outliers.py CHECKPOINT DESTINATION --channels 7 123 300 411 --factor 64

writes a copy of a small Llama-family checkpoint with them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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


def write_outlier_checkpoint(source: Path, destination: Path, channels: Iterable[int], factor: float) -> Path:
    """Copy a checkpoint directory and inject outliers into it; the weights become one file, in their own dtypes.

    The arithmetic is float32, and every changed tensor is rounded to its dtype once. A power of two as the factor
    changes exponents alone: the copy computes the very same function but for weights that become subnormal.
    """
    destination.mkdir(parents=True)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            state.update(load_file(file))
        elif not file.name.endswith(".index.json"):
            shutil.copyfile(file, destination / file.name)
    changed = {name: tensor.float() for name, tensor in state.items()}
    for name in inject_activation_outliers(changed, channels, factor):
        state[name] = changed[name].to(state[name].dtype)
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy a checkpoint with activation outliers in some channels.")
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--channels", type=int, nargs="+", required=True)
    parser.add_argument("--factor", type=float, required=True)
    arguments = parser.parse_args()
    write_outlier_checkpoint(arguments.source, arguments.destination, arguments.channels, arguments.factor)
    print(arguments.destination)


if __name__ == "__main__":
    main()
