"""CUDA implementations of the decoder's operators: allocate the outputs and launch on the current stream.

No copy between host and device and no synchronization: every operator can be captured in a CUDA graph.
"""

import torch

from .checks import check_rms_norm_quant, check_silu_mul_quant
from .cuda import _DTYPE_CODES, _aligned, _quantized, _require_aligned_weight
from .decoder_checks import check_decode_attention, check_kernel_limits, check_rope_append
from .library import load


def _rms_norm(x, residual, weight, eps):
    library = load()
    x, weight = _aligned(x), _aligned(weight)
    residual_pointer = total_pointer = 0
    total = None
    if residual is not None:
        residual = _aligned(residual)
        total = torch.empty_like(x)
        residual_pointer, total_pointer = residual.data_ptr(), total.data_ptr()
    y = torch.empty_like(x)
    with torch.cuda.device(x.device):
        library.rms_norm(
            x.data_ptr(),
            residual_pointer,
            weight.data_ptr(),
            eps,
            _DTYPE_CODES[x.dtype],
            total_pointer,
            y.data_ptr(),
            *x.shape,
            torch.cuda.current_stream().cuda_stream,
        )
    return y, total


def rms_norm(x, weight, eps):
    """CUDA implementation of `fastgemm::rms_norm`."""
    check_rms_norm_quant(x, weight, eps, None)
    return _rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x, residual, weight, eps):
    """CUDA implementation of `fastgemm::add_rms_norm`."""
    check_rms_norm_quant(x, weight, eps, residual)
    return _rms_norm(x, residual, weight, eps)


def silu_mul(gate_up):
    """CUDA implementation of `fastgemm::silu_mul`."""
    check_silu_mul_quant(gate_up)
    library = load()
    gate_up = _aligned(gate_up)
    m, i = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(m, i)
    with torch.cuda.device(gate_up.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.silu_mul(gate_up.data_ptr(), _DTYPE_CODES[gate_up.dtype], y.data_ptr(), m, i, stream)
    return y


def _require_aligned_caches(k_cache, v_cache):
    _require_aligned_weight("k_cache", k_cache)
    _require_aligned_weight("v_cache", v_cache)


def rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads):
    """CUDA implementation of `fastgemm::rope_append`."""
    shape = check_rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads)
    check_kernel_limits(qkv, shape)
    _require_aligned_caches(k_cache, v_cache)
    library = load()
    qkv, cos_sin, positions, rows = _aligned(qkv), _aligned(cos_sin), _aligned(positions), _aligned(rows)
    q = qkv.new_empty(shape.tokens, num_heads, shape.head_dim)
    with torch.cuda.device(qkv.device):
        library.rope_append(
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            positions.data_ptr(),
            rows.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q.data_ptr(),
            _DTYPE_CODES[qkv.dtype],
            shape.tokens,
            num_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.max_len,
            shape.batch,
            torch.cuda.current_stream().cuda_stream,
        )
    return q


def _decode_attention(
    qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window, quantized, splits=0, cache_ready=False
):
    """The output, or (q, scale) if `quantized`; splits: CTAs that share the positions of a head (0: chosen)."""
    shape = check_decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window)
    check_kernel_limits(qkv, shape)
    _require_aligned_caches(k_cache, v_cache)
    library = load()
    qkv, cos_sin, lengths = _aligned(qkv), _aligned(cos_sin), _aligned(lengths)
    width = num_heads * shape.head_dim
    scale = None
    if quantized:
        out, scale = _quantized(qkv, width)
    else:
        out = qkv.new_empty(shape.tokens, width)
    sizes = (shape.tokens, num_heads, shape.kv_heads, shape.head_dim, shape.max_len, min(window or 0, shape.max_len))
    with torch.cuda.device(qkv.device):
        workspace_bytes = library.decode_attention_workspace_bytes(*sizes, splits)
        workspace = qkv.new_empty(workspace_bytes, dtype=torch.uint8)
        library.decode_attention(
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            lengths.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            shape.head_dim**-0.5 if softmax_scale is None else softmax_scale,
            _DTYPE_CODES[qkv.dtype],
            out.data_ptr(),
            scale.data_ptr() if quantized else 0,
            *sizes,
            splits,
            cache_ready,
            workspace.data_ptr(),
            workspace_bytes,
            torch.cuda.current_stream().cuda_stream,
        )
    return (out, scale) if quantized else out


def decode_attention(
    qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False
):
    """CUDA implementation of `fastgemm::decode_attention`."""
    return _decode_attention(
        qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window, False, cache_ready=cache_ready
    )


def decode_attention_quant(
    qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False
):
    """CUDA implementation of `fastgemm::decode_attention_quant`."""
    return _decode_attention(
        qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window, True, cache_ready=cache_ready
    )
