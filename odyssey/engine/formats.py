"""Number formats of linear layers that the engine runs, and the bytes that a weight takes in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from odyssey.errors import UnsupportedError
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme


@dataclass(frozen=True)
class LinearFormat:
    """One way to hold and multiply a weight.

    name: as in tables and on command lines. kernel: which linear layer of `linear.py` runs it. weight_bits: as held in
    memory. group_size: input features that share a scale; PER_CHANNEL (-1) for all. takes_int8: whether its input is
    per-token int8, which the norm, attention or activation in front then produces.
    """

    name: str
    kernel: str
    weight_bits: int
    group_size: int = PER_CHANNEL

    @property
    def takes_int8(self) -> bool:
        return self.kernel in ("w8a8", "w4a8", "w4a8-grouped")

    def input_multiple(self) -> int:
        """Input features must be a multiple of this; the engine pads the intermediate size to it."""
        if self.kernel == "float":
            return 1
        return 32 if self.group_size == PER_CHANNEL else math.lcm(32, self.group_size)

    def weight_bytes(self, out_features: int, in_features: int, element_size: int = 2) -> int:
        """Bytes of one weight with its scales, which is what a decoding step reads of it."""
        if self.kernel == "float":
            return out_features * in_features * element_size
        groups = 1 if self.group_size == PER_CHANNEL else -(-in_features // self.group_size)
        # Scales of weight-only formats are in the activations' dtype, those of integer products float32.
        scale_bytes = 4 if self.takes_int8 else element_size
        return out_features * in_features * self.weight_bits // 8 + out_features * groups * scale_bytes


FORMATS: dict[str, LinearFormat] = {
    each.name: each
    for each in (
        LinearFormat("fp16", "float", 16),
        LinearFormat("w8a8", "w8a8", 8),
        LinearFormat("w4a16-g128", "w4a16", 4, 128),
        LinearFormat("w4a8", "w4a8", 4),
        LinearFormat("w4a8-g128", "w4a8-grouped", 4, 128),
    )
}


def format_of(scheme: QuantScheme) -> LinearFormat:
    """The format that runs a quantization scheme.

    Raises UnsupportedError, naming the scheme, where there is no kernel for it.
    """
    if scheme.weight_bits == 16 and scheme.activation_bits == 16:
        return FORMATS["fp16"]
    per_channel = scheme.group_size == PER_CHANNEL
    if scheme.activation_bits == 8 and scheme.symmetric and scheme.weight_bits <= 8:
        if per_channel:
            return FORMATS["w4a8" if scheme.weight_bits <= 4 else "w8a8"]
        if scheme.weight_bits <= 4:
            return LinearFormat(f"w4a8-g{scheme.group_size}", "w4a8-grouped", 4, scheme.group_size)
    if scheme.activation_bits == 16 and scheme.weight_bits <= 4:
        name = "w4a16" if per_channel else f"w4a16-g{scheme.group_size}"
        return LinearFormat(name, "w4a16", 4, scheme.group_size)
    symmetry = "symmetric" if scheme.symmetric else "asymmetric"
    raise UnsupportedError(
        f"the engine has no kernel for {symmetry} {scheme.label}; it runs 16-bit weights, symmetric W8A8 and W4A8, "
        "and W4A16; measure others with latency=transformers"
    )
