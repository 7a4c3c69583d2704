"""Argument checks of the decoder's operators, shared by their CUDA, CPU and fake implementations."""

import math
from dataclasses import dataclass

import torch

from .checks import FLOAT_DTYPES, check_tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: `tokens` rows of qkv, and the cache's other dimensions."""

    tokens: int
    num_heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    batch: int


def _check_index(name: str, t: torch.Tensor, length: int, like: torch.Tensor) -> None:
    check_tensor(name, t, (torch.int32,), 1, like)
    if t.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}] (one entry per row of qkv), got {list(t.shape)}")


def _check_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> AttentionShape:
    check_tensor("qkv", qkv, FLOAT_DTYPES, 2, qkv)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, (qkv.dtype,), 4, qkv)
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous [batch, kv_heads, max_len, head_dim]: it is written in place")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, got {list(v_cache.shape)}")
    batch, kv_heads, max_len, head_dim = k_cache.shape
    if kv_heads == 0 or max_len == 0 or head_dim == 0 or head_dim % 2 != 0:
        raise ValueError(
            f"k_cache must be [batch, kv_heads, max_len, head_dim] with an even head_dim, got {list(k_cache.shape)}"
        )
    if num_heads < 1 or num_heads % kv_heads != 0:
        raise ValueError(f"num_heads must be a positive multiple of the cache's {kv_heads} heads, got {num_heads}")
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"qkv must have {(num_heads + 2 * kv_heads) * head_dim} columns: ({num_heads} + 2 * {kv_heads}) heads of "
            f"{head_dim}, got {qkv.shape[1]}"
        )
    check_tensor("cos_sin", cos_sin, (torch.float32,), 2, qkv)
    if cos_sin.shape[1] != head_dim or cos_sin.shape[0] < max_len:
        raise ValueError(
            f"cos_sin must have shape [at least {max_len} (the cache's max_len), {head_dim}], got {list(cos_sin.shape)}"
        )
    return AttentionShape(qkv.shape[0], num_heads, kv_heads, head_dim, max_len, batch)


def check_rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads) -> AttentionShape:
    """Check the arguments of `fastgemm.rope_append`."""
    shape = _check_attention(qkv, cos_sin, k_cache, v_cache, num_heads)
    _check_index("positions", positions, shape.tokens, qkv)
    _check_index("rows", rows, shape.tokens, qkv)
    return shape


def check_decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window) -> AttentionShape:
    """Check the arguments of `fastgemm.decode_attention`."""
    shape = _check_attention(qkv, cos_sin, k_cache, v_cache, num_heads)
    _check_index("lengths", lengths, shape.tokens, qkv)
    if shape.batch != shape.tokens:
        raise ValueError(f"k_cache must have a row for each of the {shape.tokens} rows of qkv, got {shape.batch}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1 position, got {window}")
    return shape


def check_kernel_limits(qkv: torch.Tensor, shape: AttentionShape) -> None:
    """Check what only the CUDA kernels require of the arguments."""
    if qkv.dtype not in HALF_DTYPES:
        raise TypeError(f"qkv must be float16 or bfloat16 on a GPU, got {str(qkv.dtype).removeprefix('torch.')}")
    if shape.head_dim not in KERNEL_HEAD_DIMS:
        raise ValueError(f"k_cache must have a head_dim of {KERNEL_HEAD_DIMS} on a GPU, got {shape.head_dim}")
