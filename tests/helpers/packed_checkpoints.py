"""GPTQ and AWQ checkpoints with random integers, packed word by word with Python's integers as the formats define."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from odyssey.models.architecture import LlamaFamily

NAMES = [name for group in LlamaFamily.linear_groups for name in group]


@dataclass
class PackedLayout:
    """What the checkpoint says of itself, and how it is packed. zeros: "middle", "random" or "random with 0"."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    version: str | None = "gptq"
    act_order: bool = False
    zeros: str = "middle"

    def description(self) -> dict:
        content = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return {**content, "zero_point": True, "version": "gemm"}
        content |= {"desc_act": self.act_order, "sym": self.zeros == "middle"}
        return content if self.version is None else {**content, "checkpoint_format": self.version}


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> int32 [n * bits / 32, m]: along dimension 0, field i of every 32 at bit i * bits."""
    columns = []
    for column in fields.T:
        words = []
        for start in range(0, len(column), 32):
            number = sum(int(value) << (bits * index) for index, value in enumerate(column[start : start + 32]))
            words += [(number >> (32 * word)) & 0xFFFFFFFF for word in range(bits)]
        columns.append(words)
    return np.array(columns, dtype=np.uint32).T.view(np.int32)


def pack_layer(
    values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, layout: PackedLayout, g_idx: np.ndarray
) -> dict[str, torch.Tensor]:
    """Tensors of a layer from integers [in, out], float16 scales and integer zero points [groups, out]."""
    if layout.method == "awq":
        tensors = {"qweight": _pack_awq(values), "qzeros": _pack_awq(zeros)}
    else:
        stored = zeros
        if layout.version != "gptq_v2":
            if layout.bits == 3:
                stored = (zeros - 1) % 8
                qzeros = pack_fields(stored.T, 3).T
            else:
                ones = np.uint32(sum(1 << shift for shift in range(0, 32, layout.bits)))
                packed = pack_fields(zeros.T, layout.bits).T.copy().view(np.uint32)
                qzeros = (packed - ones).view(np.int32)
        else:
            qzeros = pack_fields(stored.T, layout.bits).T
        tensors = {"qweight": pack_fields(values, layout.bits), "qzeros": qzeros, "g_idx": g_idx.astype(np.int32)}
    packed = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    return {**packed, "scales": torch.from_numpy(scales)}


def _pack_awq(fields: np.ndarray) -> np.ndarray:
    """[n, m] -> int32 [n, m / 8]: output features 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up."""
    words = np.zeros((fields.shape[0], fields.shape[1] // 8), dtype=np.uint64)
    for nibble, feature in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= fields[:, feature::8].astype(np.uint64) << np.uint64(4 * nibble)
    return words.astype(np.uint32).view(np.int32)


def quantize_checkpoint_randomly(
    directory: Path, layout: PackedLayout, seed: int = 0, describe_in: str = "config.json"
) -> dict[str, np.ndarray]:
    """Replace the linear layers of a checkpoint by random integers; returns the weights they stand for, float64.

    describe_in: config.json, or the file of an earlier release. Keys of the result are parameter names.
    """
    generator = np.random.default_rng(seed)
    file = directory / "model.safetensors"
    state, weights = load_file(file), {}
    for key in [key for key in state if key.removesuffix(".weight").endswith(tuple(NAMES))]:
        out_features, in_features = state[key].shape
        group_size = in_features if layout.group_size == -1 else layout.group_size
        groups = -(-in_features // group_size)
        g_idx = np.arange(in_features) // group_size
        if layout.act_order:
            g_idx = generator.permutation(g_idx)
        values = generator.integers(0, 2**layout.bits, (in_features, out_features))
        scales = (generator.uniform(0.2, 1, (groups, out_features)) * 0.2 / 2**layout.bits).astype(np.float16)
        zeros = {
            "middle": lambda size: np.full(size, 2 ** (layout.bits - 1)),
            "random": lambda size: generator.integers(1, 2**layout.bits, size),
            "random with 0": lambda size: generator.integers(0, 2**layout.bits, size),
        }[layout.zeros]((groups, out_features))
        weights[key] = ((values - zeros[g_idx]) * scales[g_idx].astype(np.float64)).T
        name = key.removesuffix(".weight")
        del state[key]
        state.update({f"{name}.{leaf}": t for leaf, t in pack_layer(values, scales, zeros, layout, g_idx).items()})
    save_file(state, file, metadata={"format": "pt"})
    description = layout.description()
    if describe_in == "config.json":
        config = json.loads((directory / describe_in).read_text())
        (directory / describe_in).write_text(json.dumps({**config, "quantization_config": description}))
    else:
        (directory / describe_in).write_text(json.dumps(description))
    return weights
