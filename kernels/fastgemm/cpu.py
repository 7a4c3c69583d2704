"""CPU implementations of the operators: exact integer products, the same rounding points as the CUDA
kernels."""

import functools

import torch
import torch.nn.functional as F

from .checks import (
    check_quantize_per_token,
    check_rms_norm_quant,
    check_silu_mul_quant,
    check_w4a8_gemm,
    check_w8a8_gemm,
)
from .packing import TILE_COLUMNS, TILE_ROWS

# Unpacked weight handled at a time: enough for an efficient product, few enough bytes to stay in cache.
_BLOCK_BYTES = 2**20
# Products of int8 values, none larger than 2^14, whose sums are at most 2^24.
_EXACT_COLUMNS = 2**10


@functools.cache
def _int_mm_min_rows() -> int | None:
    """Fewest rows for which `torch._int_mm` is exact on this CPU, or None where it cannot be trusted.

    Builds differ in the row counts they accept, and int8 products saturate on CPUs without VNNI instructions
    in some of them; both show on operands at the ends of the int8 range.
    """
    k, n = 512, 64
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    w[0], w[1] = -128, 127
    for min_rows in (1, 32):
        exact = True
        for rows in (min_rows, min_rows + 2, 64):
            x = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator)
            x[0] = -128
            x[-1, ::2] = 127
            try:
                product = torch._int_mm(x, w.t())
            except (RuntimeError, NotImplementedError, AttributeError):
                exact = False
                break
            if not torch.equal(product.double(), x.double() @ w.double().t()):
                exact = False
                break
        if exact:
            return min_rows
    return None


def _float_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As `int8_matmul`, in fp32: whatever the order, no sum of so few products needs more than its 24 bits."""
    blocks = zip(x.split(_EXACT_COLUMNS, dim=1), w.split(_EXACT_COLUMNS, dim=1), strict=True)
    return sum((a.float() @ b.float().t()).to(torch.int32) for a, b in blocks)


def int8_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Exact x @ w.T for int8 x [M, K] and w [N, K] with K at most `packing.MAX_K`: int32 [M, N]."""
    m, k = x.shape
    if m == 0 or k == 0:
        return x.new_zeros(m, w.shape[0], dtype=torch.int32)
    min_rows = _int_mm_min_rows()
    if min_rows is None:
        return _float_matmul(x, w)
    if m < min_rows:
        return torch._int_mm(F.pad(x, (0, 0, 0, min_rows - m)), w.t())[:m]
    return torch._int_mm(x, w.t())


def _epilogue(
    acc: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if out_dtype == torch.int32:
        return acc
    y = acc.to(torch.float32).mul_(x_scale[:, None]).mul_(w_scale)
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(out_dtype)


def w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    """CPU implementation of `fastgemm::w8a8_gemm`."""
    check_w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch)
    return _epilogue(int8_matmul(x.contiguous(), w), x_scale, w_scale, bias, out_dtype)


def w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    """CPU implementation of `fastgemm::w4a8_gemm`."""
    n, k = check_w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch)
    return _epilogue(_w4a8_accumulate(x, w_packed, n, k), x_scale, w_scale, bias, out_dtype)


def _w4a8_accumulate(x: torch.Tensor, w_packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Raw int32 [M, N] products with a packed weight.

    A packed row is 64 consecutive bytes of a tile, its columns in the order (q, s, p, b) instead of (s, p, q,
    b). A dot product does not care about the order of its terms, so the columns of the activations are
    permuted and the weight only has its nibbles separated; the factor 16 is shifted out of the accumulator.
    """
    m = x.shape[0]
    row_tiles, column_tiles, _ = w_packed.shape
    columns = column_tiles * TILE_COLUMNS
    # Four columns are a word, whose bytes stay together; the copy that pad makes begins at one.
    words = F.pad(x, (0, columns - k)).contiguous().view(torch.int32)
    x = words.view(m, column_tiles, 4, 4).transpose(2, 3).reshape(m, columns // 4).view(torch.int8)
    step = min(row_tiles, max(1, _BLOCK_BYTES // (TILE_ROWS * columns)))
    unpacked = w_packed.new_empty(step, 4, 2, 8, columns)  # row tile, warp, nibble, row; high nibbles come first
    products = []
    for tiles in w_packed.split(step):
        block = unpacked[: tiles.shape[0]]
        high, low = block.unbind(2)
        fragments = tiles.view(-1, column_tiles, 4, 8, TILE_COLUMNS).permute(0, 2, 3, 1, 4)
        low.view(fragments.shape).copy_(fragments)
        torch.bitwise_and(low, 0xF0, out=high)
        low.mul_(16)  # uint8: a shift to the left by four, and faster
        products.append(int8_matmul(x, block.view(-1, columns).view(torch.int8)))
    return torch.cat(products, dim=1)[:, :n].contiguous().bitwise_right_shift_(4)


def quantize_per_token(x):
    """CPU implementation of `fastgemm::quantize_per_token`."""
    check_quantize_per_token(x)
    return _quantize_rows(x.to(torch.float32))


def _quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()  # element-wise results keep the strides of what they are made of
    absmax = x.abs().amax(dim=1)
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127)
    q = (x / scale[:, None]).round_().clamp_(-128, 127)
    # A NaN has no int8 value; it becomes 0 and the row's NaN or Inf scale carries it into the product.
    return q.nan_to_num_(nan=0.0).to(torch.int8), scale


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def rms_norm_quant(x, weight, eps):
    """CPU implementation of `fastgemm::rms_norm_quant`."""
    check_rms_norm_quant(x, weight, eps, None)
    return _quantize_rows(_rms_norm(x, weight, eps).to(torch.float32))


def add_rms_norm_quant(x, residual, weight, eps):
    """CPU implementation of `fastgemm::add_rms_norm_quant`."""
    check_rms_norm_quant(x, weight, eps, residual)
    total = (residual + x).contiguous()
    q, scale = _quantize_rows(_rms_norm(total, weight, eps).to(torch.float32))
    return q, scale, total


def silu_mul_quant(gate_up):
    """CPU implementation of `fastgemm::silu_mul_quant`."""
    check_silu_mul_quant(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return _quantize_rows((F.silu(gate) * up).to(torch.float32))
