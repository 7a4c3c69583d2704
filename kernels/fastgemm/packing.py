"""Packed int4 weights, layout v1: one layout for every GPU architecture and for the CPU.

An int4 weight [N, K] (values -8..7) becomes uint8 [ceil(N/64), ceil(K/64), 2048]; the padding is 0.
Tile (nb, kb) holds rows 64nb.. and columns 64kb.. of the weight. Inside a tile the byte address is

    warp * 512 + lane * 16 + (2 * s + p) * 4 + b      warp 0..3, lane 0..31, s 0..1, p 0..1, b 0..3

    row    (high nibble) = 16 * warp + lane // 4
    row    (low nibble)  = 16 * warp + lane // 4 + 8
    column               = 32 * s + 16 * p + 4 * (lane % 4) + b

which is operand A of the int8 tensor-core instructions `wgmma.m64nNk32` and `mma.m16n8k32`: a thread's
16-byte load is its operand of one k = 64 step. A nibble in the HIGH half of a byte is, as an int8, sixteen
times its value, so `w & 0xF0F0F0F0` and `(w << 4) & 0xF0F0F0F0` are all it takes to make int8 operands of a
packed word (FastGEMM of OdysseyLLM, arXiv 2311.09550, section 4.4); the factor 16 leaves with the scale.
"""

import torch

TILE_ROWS = 64
TILE_COLUMNS = 64
TILE_BYTES = TILE_ROWS * TILE_COLUMNS // 2
ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 32

# Largest K for which sum_k 16 * w * x (W4A8) and sum_k w * x (W8A8) cannot leave int32: both are bounded by
# 2^14 * K in magnitude, and 2^31 itself is already out of range.
MAX_K = 2**17 - COLUMN_MULTIPLE


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of the packed form of an int4 weight [n, k]."""
    return -(-n // TILE_ROWS), -(-k // TILE_COLUMNS), TILE_BYTES


def check_weight_size(n: int, k: int) -> None:
    """Raise ValueError unless an [n, k] weight can be used by the GEMMs."""
    if n <= 0 or n % ROW_MULTIPLE != 0:
        raise ValueError(f"N (output features) must be a positive multiple of {ROW_MULTIPLE}, got {n}")
    if k <= 0 or k % COLUMN_MULTIPLE != 0:
        raise ValueError(f"K (input features) must be a positive multiple of {COLUMN_MULTIPLE}, got {k}")
    if k > MAX_K:
        raise ValueError(f"K (input features) must be at most {MAX_K} for int32 accumulation, got {k}")


def pack(w: torch.Tensor) -> torch.Tensor:
    """Pack an int4 weight.

    Args:
        w: int8 [N, K] with values in [-8, 7], on any device; N a multiple of 16, K of 32.

    Returns:
        uint8 [ceil(N/64), ceil(K/64), 2048], contiguous, on the same device (layout v1, see the module).

    Raises:
        TypeError: `w` is not an int8 tensor.
        ValueError: its shape does not fit, or a value lies outside [-8, 7].
    """
    if not isinstance(w, torch.Tensor) or w.dtype != torch.int8:
        raise TypeError(f"w must be an int8 tensor, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2:
        raise ValueError(f"w must have shape [N, K], got {list(w.shape)}")
    n, k = w.shape
    check_weight_size(n, k)
    if not w.is_meta:
        low, high = (int(v) for v in torch.aminmax(w))
        if low < -8 or high > 7:
            raise ValueError(f"w must hold int4 values in [-8, 7], found {low}..{high}")
    row_tiles, column_tiles, _ = packed_shape(n, k)
    padded = w.new_zeros(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    padded[:n, :k] = w
    #                      0: nb   1: warp 2: half 3: r 4: kb       5: s 6: p 7: q 8: b
    fragments = padded.view(row_tiles, 4, 2, 8, column_tiles, 2, 2, 4, 4)
    fragments = fragments.permute(2, 0, 4, 1, 3, 7, 5, 6, 8).contiguous().view(torch.uint8)
    packed = (fragments[0] << 4) | (fragments[1] & 0x0F)
    return packed.view(row_tiles, column_tiles, TILE_BYTES)


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [ceil(n/64), ceil(k/64), 2048], on any device.
        n, k: the weight's size before packing.

    Returns:
        int8 [n, k] with values in [-8, 7], contiguous.

    Raises:
        TypeError: `packed` is not a uint8 tensor.
        ValueError: `n`, `k` are no weight size, or `packed` does not have their packed shape.
    """
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"packed must be a uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
    check_weight_size(n, k)
    row_tiles, column_tiles, _ = packed_shape(n, k)
    if tuple(packed.shape) != (row_tiles, column_tiles, TILE_BYTES):
        expected = [row_tiles, column_tiles, TILE_BYTES]
        raise ValueError(f"packed must have shape {expected} for an [{n}, {k}] weight, got {list(packed.shape)}")
    # Both nibbles as the high half of a byte; the arithmetic shift right restores value and sign.
    halves = torch.stack((packed & 0xF0, packed << 4)).view(torch.int8) >> 4
    fragments = halves.view(2, row_tiles, column_tiles, 4, 8, 4, 2, 2, 4)
    weight = fragments.permute(1, 3, 0, 4, 2, 6, 7, 5, 8).reshape(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return weight[:n, :k].contiguous()
