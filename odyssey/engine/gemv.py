"""Product of one token with a floating-point weight, bound by reading the weight: a Triton kernel.

cuBLAS reaches 2.1 to 2.6 TB/s with the weights of a 7B model at one token on an H100, and starts to read a weight only
when the kernel before it has ended. This kernel asks for its first weights before it waits for that kernel
(programmatic dependent launch, compute capability 9.0), so that memory does not idle in between.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

# Rows and columns of a program's block, and its warps: the fastest of the sizes tried on an H100 (docs/engine.md).
_BLOCK_ROWS, _BLOCK_COLUMNS, _WARPS = 2, 2048, 4

if triton is not None:

    @triton.jit
    def _gemv_kernel(
        x_pointer,
        w_pointer,
        bias_pointer,
        y_pointer,
        n,
        k,
        has_bias: tl.constexpr,
        even_k: tl.constexpr,
        overlap: tl.constexpr,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
    ):
        rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
        columns = tl.arange(0, block_columns)
        inside = (rows < n)[:, None]
        pointers = w_pointer + rows.to(tl.int64)[:, None] * k + columns[None, :]
        if even_k:
            w = tl.load(pointers, mask=inside, other=0.0)
        else:
            w = tl.load(pointers, mask=inside & (columns < k)[None, :], other=0.0)
        if overlap:
            tl.extra.cuda.gdc_launch_dependents()
            # x is what the kernel before this one writes, y what an earlier one may still read.
            tl.extra.cuda.gdc_wait()
        total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
        for begin in range(0, k, block_columns):
            following = begin + block_columns + columns
            if even_k:
                x = tl.load(x_pointer + begin + columns)
            else:
                x = tl.load(x_pointer + begin + columns, mask=begin + columns < k, other=0.0)
            w_next = tl.load(pointers + begin + block_columns, mask=inside & (following < k)[None, :], other=0.0)
            total += w.to(tl.float32) * x.to(tl.float32)[None, :]
            w = w_next
        y = tl.sum(total, axis=1)
        if has_bias:
            y += tl.load(bias_pointer + rows, mask=rows < n, other=0.0).to(tl.float32)
        tl.store(y_pointer + rows, y.to(y_pointer.dtype.element_ty), mask=rows < n)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias with fp32 sums: x [tokens, K], weight [N, K], bias [N] or None -> [tokens, N] in x's dtype.

    One token of float16 or bfloat16 on a GPU goes through the kernel above, everything else through the library.
    """
    if x.shape[0] != 1 or not _takes(x, weight):
        return F.linear(x, weight, bias)
    n, k = weight.shape
    y = x.new_empty(1, n)
    overlap = overlaps(x.device)
    _gemv_kernel[(triton.cdiv(n, _BLOCK_ROWS),)](
        x, weight, weight if bias is None else bias, y, n, k,
        has_bias=bias is not None, even_k=k % _BLOCK_COLUMNS == 0, overlap=overlap,
        block_rows=_BLOCK_ROWS, block_columns=_BLOCK_COLUMNS, num_warps=_WARPS, launch_pdl=overlap,
    )  # fmt: skip
    return y


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        triton is not None
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.is_contiguous()
        and weight.is_contiguous()
    )


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether the GPU starts a kernel while the one before it still runs, where both ask for it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
