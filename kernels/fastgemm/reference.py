"""Independent references of every operator in NumPy.

Sums are int64, rounding is IEEE fp32 where it is defined, the rest is float64. They share no code with the
operators and are written for clarity; the packing one is a loop over elements.
"""

import numpy as np


def pack(w: np.ndarray) -> np.ndarray:
    """Layout v1, element by element from its definition.

    int8 [N, K] to uint8 [ceil(N/64), ceil(K/64), 2048].
    """
    n, k = w.shape
    packed = np.zeros((-(-n // 64), -(-k // 64), 2048), dtype=np.uint8)
    for row in range(n):
        warp, in_warp = divmod(row % 64, 16)
        low_nibble, lane_row = divmod(in_warp, 8)
        for column in range(k):
            s, in_step = divmod(column % 64, 32)
            p, in_half = divmod(in_step, 16)
            lane_column, b = divmod(in_half, 4)
            address = warp * 512 + (4 * lane_row + lane_column) * 16 + (2 * s + p) * 4 + b
            nibble = int(w[row, column]) & 0xF
            packed[row // 64, column // 64, address] |= nibble if low_nibble else nibble << 4
    return packed


def accumulate(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Exact sum_k x[m, k] * w[n, k] in int64: [M, N] of integer x [M, K] and w [N, K]."""
    return x.astype(np.int64) @ w.astype(np.int64).T


def scale_output(
    acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """The GEMMs' epilogue, each step rounded to fp32: acc * x_scale[m] * w_scale[n] + bias[n], [M, N]."""
    y = acc.astype(np.float32) * x_scale.astype(np.float32)[:, None]
    y = y * w_scale.astype(np.float32)
    return y if bias is None else y + bias.astype(np.float32)


def quantize_per_token(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-token int8 quantization of fp32 [M, K], bit for bit what the operators return.

    Returns (int8 [M, K], fp32 [M]).
    """
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        absmax = np.max(np.abs(x), axis=1)
        scale = np.where(absmax == 0, np.float32(1), absmax / np.float32(127)).astype(np.float32)
        q = np.clip(np.rint(x / scale[:, None]), -128, 127)
    return np.where(np.isnan(q), 0, q).astype(np.int8), scale


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm in float64: [M, K]."""
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * weight.astype(np.float64)


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up in float64: [M, I] of [M, 2 * I], the gate first."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up
