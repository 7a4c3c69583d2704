"""CUDA implementations of the operators: allocate the outputs and launch on the current stream of the device.

No copy between host and device and no synchronization: every operator can be captured in a CUDA graph.
"""

import torch

from .checks import (
    check_quantize_per_token,
    check_rms_norm_quant,
    check_silu_mul_quant,
    check_w4a8_gemm,
    check_w8a8_gemm,
)
from .library import load

_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.int32: 2, torch.float32: 3}
_W4A8, _W8A8 = 0, 1
_WEIGHTS_READY = 0x100  # FG_WEIGHTS_READY
_MAX_ROWS_PER_LAUNCH = 65536
_ALIGNMENT = 16


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` itself if the kernels can read it with 16-byte accesses, else a copy."""
    if t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _require_aligned_weight(name: str, w: torch.Tensor) -> None:
    if w.data_ptr() % _ALIGNMENT != 0:
        raise ValueError(f"{name} must be {_ALIGNMENT}-byte aligned: call .clone() once, when the weight is made")


def _gemm(kind, x, x_scale, w, w_scale, bias, out_dtype, arch, n, k):
    library = load()
    function = library.w4a8_gemm if kind == _W4A8 else library.w8a8_gemm
    x, x_scale, w_scale = _aligned(x), _aligned(x_scale), _aligned(w_scale)
    bias_pointer = 0
    if bias is not None:
        bias = _aligned(bias)
        bias_pointer = bias.data_ptr()
    m = x.shape[0]
    out = x.new_empty(m, n, dtype=out_dtype)
    if m == 0:
        return out
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        for begin in range(0, m, _MAX_ROWS_PER_LAUNCH):
            rows = min(m - begin, _MAX_ROWS_PER_LAUNCH)
            workspace_bytes = library.gemm_workspace_bytes(kind, rows, n, k, arch)
            workspace = x.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
            function(
                x.data_ptr() + begin * k,
                x_scale.data_ptr() + begin * 4,
                w.data_ptr(),
                w_scale.data_ptr(),
                bias_pointer,
                out.data_ptr() + begin * n * out.element_size(),
                rows,
                n,
                k,
                _DTYPE_CODES[out_dtype],
                workspace.data_ptr() if workspace_bytes else 0,
                workspace_bytes,
                arch,
                stream,
            )
    return out


def w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    """CUDA implementation of `fastgemm::w4a8_gemm`."""
    n, k = check_w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch)
    _require_aligned_weight("w_packed", w_packed)
    return _gemm(_W4A8, x, x_scale, w_packed, w_scale, bias, out_dtype, arch + weights_ready * _WEIGHTS_READY, n, k)


def w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    """CUDA implementation of `fastgemm::w8a8_gemm`."""
    n, k = check_w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch)
    _require_aligned_weight("w", w)
    return _gemm(_W8A8, x, x_scale, w, w_scale, bias, out_dtype, arch + weights_ready * _WEIGHTS_READY, n, k)


def _quantized(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def quantize_per_token(x):
    """CUDA implementation of `fastgemm::quantize_per_token`."""
    check_quantize_per_token(x)
    library = load()
    x = _aligned(x)
    m, k = x.shape
    q, scale = _quantized(x, k)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.quantize_per_token(x.data_ptr(), _DTYPE_CODES[x.dtype], q.data_ptr(), scale.data_ptr(), m, k, stream)
    return q, scale


def _rms_norm_quant(x, residual, weight, eps):
    library = load()
    x, weight = _aligned(x), _aligned(weight)
    residual_pointer = total_pointer = 0
    total = None
    if residual is not None:
        residual = _aligned(residual)
        total = torch.empty_like(x)
        residual_pointer, total_pointer = residual.data_ptr(), total.data_ptr()
    m, k = x.shape
    q, scale = _quantized(x, k)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.rms_norm_quant(
            x.data_ptr(),
            residual_pointer,
            weight.data_ptr(),
            eps,
            _DTYPE_CODES[x.dtype],
            total_pointer,
            q.data_ptr(),
            scale.data_ptr(),
            m,
            k,
            stream,
        )
    return q, scale, total


def rms_norm_quant(x, weight, eps):
    """CUDA implementation of `fastgemm::rms_norm_quant`."""
    check_rms_norm_quant(x, weight, eps, None)
    q, scale, _ = _rms_norm_quant(x, None, weight, eps)
    return q, scale


def add_rms_norm_quant(x, residual, weight, eps):
    """CUDA implementation of `fastgemm::add_rms_norm_quant`."""
    check_rms_norm_quant(x, weight, eps, residual)
    return _rms_norm_quant(x, residual, weight, eps)


def silu_mul_quant(gate_up):
    """CUDA implementation of `fastgemm::silu_mul_quant`."""
    check_silu_mul_quant(gate_up)
    library = load()
    gate_up = _aligned(gate_up)
    m, i = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale = _quantized(gate_up, i)
    with torch.cuda.device(gate_up.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.silu_mul_quant(
            gate_up.data_ptr(), _DTYPE_CODES[gate_up.dtype], q.data_ptr(), scale.data_ptr(), m, i, stream
        )
    return q, scale
