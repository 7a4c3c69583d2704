"""Storage of integer weights in a checkpoint: two 4-bit values to a byte, wider ones as bytes."""

from __future__ import annotations

import torch


def pack_values(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [out, in] (int8 or uint8) -> uint8 as stored.

    bits <= 4: two values to a byte, [out, ceil(in / 2)]; even columns in the low nibble, two's complement for signed
    values, a missing last column is 0. Wider: the bytes themselves, [out, in].
    Raises ValueError when a value does not fit.
    """
    if values.dtype not in (torch.int8, torch.uint8) or values.dim() != 2:
        raise ValueError(f"values must be int8 or uint8 [out, in], not {values.dtype} {tuple(values.shape)}")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if values.dtype == torch.int8 else (0, 2**bits - 1)
    if values.numel() and (values.min() < low or values.max() > high):
        raise ValueError(f"values must lie in [{low}, {high}] for {bits} bits")
    if bits > 4:
        return values.contiguous().view(torch.uint8)
    nibbles = values.view(torch.uint8) & 0x0F
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()


def unpack_values(packed: torch.Tensor, bits: int, in_features: int, *, signed: bool) -> torch.Tensor:
    """Exact inverse of `pack_values`: uint8 as stored -> int8 (signed) or uint8 [out, in_features]."""
    if bits > 4:
        return packed.view(torch.int8) if signed else packed
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(1)[:, :in_features].contiguous()
    if not signed:
        return nibbles
    # Moving the nibble to the top of a signed byte and shifting back extends the sign.
    return (nibbles << 4).view(torch.int8) >> 4
