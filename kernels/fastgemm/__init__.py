"""FastGEMM: W4A8 and W8A8 matrix products with per-token activation and per-channel weight scales.

The kernels of OdysseyLLM (arXiv 2311.09550) as torch operators, with the quantizing element-wise steps around
them. CUDA kernels for sm_80, sm_86, sm_89 and sm_90; exact CPU implementations of everything.
"""

from .decoder_ops import decode_attention, decode_attention_quant, rms_norm, rope_append, silu_mul
from .library import FastGemmError
from .ops import quantize_per_token, rms_norm_quant, silu_mul_quant, w4a8_gemm, w8a8_gemm
from .packing import MAX_K, pack, unpack

__all__ = [
    "MAX_K",
    "FastGemmError",
    "decode_attention",
    "decode_attention_quant",
    "pack",
    "quantize_per_token",
    "rms_norm",
    "rms_norm_quant",
    "rope_append",
    "silu_mul",
    "silu_mul_quant",
    "unpack",
    "w4a8_gemm",
    "w8a8_gemm",
]
