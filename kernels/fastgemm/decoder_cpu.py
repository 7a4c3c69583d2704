"""CPU implementations of the decoder's operators: fp32 arithmetic, rounded where the CUDA kernels round."""

import torch
import torch.nn.functional as F

from .checks import check_rms_norm_quant, check_silu_mul_quant
from .cpu import _rms_norm, quantize_per_token
from .decoder_checks import check_decode_attention, check_rope_append


def rms_norm(x, weight, eps):
    """CPU implementation of `fastgemm::rms_norm`."""
    check_rms_norm_quant(x, weight, eps, None)
    return _rms_norm(x, weight, eps).contiguous()


def add_rms_norm(x, residual, weight, eps):
    """CPU implementation of `fastgemm::add_rms_norm`."""
    check_rms_norm_quant(x, weight, eps, residual)
    total = (residual + x).contiguous()
    return _rms_norm(total, weight, eps), total


def silu_mul(gate_up):
    """CPU implementation of `fastgemm::silu_mul`."""
    check_silu_mul_quant(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return (F.silu(gate) * up).contiguous()


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [T, heads, D] with the table's rows cos_sin [T, D], rounded once to the dtype of x."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _rope_and_store(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads):
    tokens, kv_heads, head_dim = qkv.shape[0], k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.view(tokens, -1, head_dim).split((num_heads, kv_heads, kv_heads), dim=1)
    angles = cos_sin[positions]
    k_cache[rows, :, positions] = _rotate(k, angles)
    v_cache[rows, :, positions] = v
    return _rotate(q, angles)


def _require_range(name: str, indices: torch.Tensor, end: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= end):
        raise ValueError(f"{name} must be in 0..{end - 1}, got {int(indices.min())}..{int(indices.max())}")


def rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads):
    """CPU implementation of `fastgemm::rope_append`."""
    shape = check_rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads)
    _require_range("positions", positions, shape.max_len)
    _require_range("rows", rows, shape.batch)
    return _rope_and_store(qkv.contiguous(), cos_sin, positions.long(), rows.long(), k_cache, v_cache, num_heads)


def decode_attention(
    qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False
):
    """CPU implementation of `fastgemm::decode_attention`."""
    shape = check_decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window)
    _require_range("lengths", lengths, shape.max_len)
    rows = torch.arange(shape.tokens)
    q = _rope_and_store(qkv.contiguous(), cos_sin, lengths.long(), rows, k_cache, v_cache, num_heads)
    scale = shape.head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = qkv.new_empty(shape.tokens, num_heads * shape.head_dim)
    for row, length in enumerate(lengths.tolist()):
        begin = 0 if window is None else max(0, length + 1 - window)
        k = k_cache[row, :, begin : length + 1].float()
        v = v_cache[row, :, begin : length + 1].float()
        scores = q[row].float().view(shape.kv_heads, -1, shape.head_dim) @ k.transpose(1, 2) * scale
        out[row] = (scores.softmax(dim=-1) @ v).flatten().to(out.dtype)
    return out


def decode_attention_quant(
    qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False
):
    """CPU implementation of `fastgemm::decode_attention_quant`."""
    return quantize_per_token(
        decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window)
    )
