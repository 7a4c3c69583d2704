"""What is quantized and how: the scheme of a linear layer and the integers it produces."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

PER_CHANNEL = -1


def check_bits(bits: int) -> None:
    """Of a method that quantizes weights, its setting `bits`. Raises ValueError outside of 2..8: 16 bits would measure
    the original model under the method's name."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2..8, not {bits}; method=fp16 leaves the weights as they are")


@dataclass(frozen=True)
class QuantScheme:
    """Number format of one linear layer's weights and input activations.

    weight_bits:      2..8, or 16 for weights that stay in floating point.
    group_size:       input features that share one scale; PER_CHANNEL (-1) for one scale per output channel.
    symmetric:        no zero point; integers in [-2^(b-1), 2^(b-1) - 1] with scale absmax / (2^(b-1) - 1).
    activation_bits:  8 for per-token dynamic symmetric int8, 16 for floating-point activations.
    """

    weight_bits: int = 4
    group_size: int = PER_CHANNEL
    symmetric: bool = True
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.weight_bits != 16 and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be 2..8 or 16, not {self.weight_bits}")
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, not {self.activation_bits}")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ValueError(f"group_size must be -1 (per channel) or at least 1, not {self.group_size}")

    @property
    def qmin(self) -> int:
        """Smallest integer: -2^(b-1) (symmetric) or 0 (asymmetric)."""
        return -(2 ** (self.weight_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest integer: 2^(b-1) - 1 (symmetric) or 2^b - 1 (asymmetric)."""
        return 2 ** (self.weight_bits - 1) - 1 if self.symmetric else 2**self.weight_bits - 1

    def num_groups(self, in_features: int) -> int:
        """Scales per output channel for a layer of `in_features` inputs (the last group may be shorter)."""
        return 1 if self.group_size == PER_CHANNEL else -(-in_features // self.group_size)

    @property
    def label(self) -> str:
        """Short name as used in tables: W4A8, W4A16-g128, ..."""
        group = "" if self.group_size == PER_CHANNEL else f"-g{self.group_size}"
        return f"W{self.weight_bits}A{self.activation_bits}{group}"

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class QuantizedWeight:
    """The integers of one linear layer: what a checkpoint stores and every kernel consumes.

    values: int8 (symmetric) or uint8 (asymmetric) [out_features, in_features], inside [scheme.qmin, scheme.qmax].
    scales: float32 [out_features, num_groups].
    zeros:  None (symmetric), else uint8 [out_features, num_groups]; weight = (value - zero) * scale.
    order:  None where column j of `values` is input feature j, else int64 [in_features]: column j is input feature
            order[j]. Checkpoints made with activation order need it, whose groups are no neighbouring features.
    """

    values: torch.Tensor
    scales: torch.Tensor
    scheme: QuantScheme
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.values.shape
        expected = (out_features, self.scheme.num_groups(in_features))
        if tuple(self.scales.shape) != expected:
            raise ValueError(f"scales have shape {tuple(self.scales.shape)}, expected {expected}")
        if self.scales.dtype != torch.float32:
            raise ValueError(f"scales must be float32, not {self.scales.dtype}")
        if (self.zeros is None) != self.scheme.symmetric:
            raise ValueError("zero points are for asymmetric schemes, and only for them")
        if self.order is not None and tuple(self.order.shape) != (in_features,):
            raise ValueError(f"order has shape {tuple(self.order.shape)}, expected {(in_features,)}")
