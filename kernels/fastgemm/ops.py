"""The operators `fastgemm::*` and their public functions.

Every operator has a CUDA, a CPU and a fake implementation (shapes and dtypes only), so it works in eager
mode, under `torch.compile`, in CUDA graphs and on machines without a GPU. All are functional: they return new
tensors and write into none of their arguments. None is differentiable: rounding has no useful gradient.

Arguments are checked before anything runs, in all three implementations. Activations may be strided or
misaligned views (they are copied); weights must be contiguous and 16-byte aligned, because a silent copy of a
weight at every call would cost more than the product.
"""

import torch

from . import cpu, cuda
from .checks import (
    check_quantize_per_token,
    check_rms_norm_quant,
    check_silu_mul_quant,
    check_tensor,
    check_w4a8_gemm,
    check_w8a8_gemm,
)

_GEMM_TAIL = "Tensor w_scale, Tensor? bias, ScalarType out_dtype, int arch=0, bool weights_ready=False) -> Tensor"
_SCHEMAS = {
    "w4a8_gemm": "(Tensor x, Tensor x_scale, Tensor w_packed, " + _GEMM_TAIL,
    "w8a8_gemm": "(Tensor x, Tensor x_scale, Tensor w, " + _GEMM_TAIL,
    "quantize_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "rms_norm_quant": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "add_rms_norm_quant": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "silu_mul_quant": "(Tensor gate_up) -> (Tensor, Tensor)",
}

_library = torch.library.Library("fastgemm", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(cpu, _name), "CPU")
    _library.impl(_name, getattr(cuda, _name), "CUDA")


def _quantized_like(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastgemm::w4a8_gemm", lib=_library)
def _(x, x_scale, w_packed, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    n, _k = check_w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch)
    return x.new_empty(x.shape[0], n, dtype=out_dtype)


@torch.library.register_fake("fastgemm::w8a8_gemm", lib=_library)
def _(x, x_scale, w, w_scale, bias, out_dtype, arch=0, weights_ready=False):
    n, _k = check_w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch)
    return x.new_empty(x.shape[0], n, dtype=out_dtype)


@torch.library.register_fake("fastgemm::quantize_per_token", lib=_library)
def _(x):
    check_quantize_per_token(x)
    return _quantized_like(x, x.shape[1])


@torch.library.register_fake("fastgemm::rms_norm_quant", lib=_library)
def _(x, weight, eps):
    check_rms_norm_quant(x, weight, eps, None)
    return _quantized_like(x, x.shape[1])


@torch.library.register_fake("fastgemm::add_rms_norm_quant", lib=_library)
def _(x, residual, weight, eps):
    check_rms_norm_quant(x, weight, eps, residual)
    return *_quantized_like(x, x.shape[1]), x.new_empty(x.shape)


@torch.library.register_fake("fastgemm::silu_mul_quant", lib=_library)
def _(gate_up):
    check_silu_mul_quant(gate_up)
    return _quantized_like(gate_up, gate_up.shape[1] // 2)


def w4a8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w_packed: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    arch: int = 0,
    weights_ready: bool = False,
) -> torch.Tensor:
    """Product of per-token int8 activations and a per-channel int4 weight (FastGEMM, arXiv 2311.09550, sec.
    4.4).

    y[m, n] = (float(sum_k x[m, k] * w[n, k]) * x_scale[m]) * w_scale[n] + bias[n], the sum exact in int32,
    the rest in fp32 with one rounding per operation, then rounded to `out_dtype`.

    Args:
        x: int8 [M, K], M any number of tokens, also 0.
        x_scale: fp32 [M].
        w_packed: uint8, the int4 weight [N, K] as `pack` returns it; N a multiple of 16, K of 32.
        w_scale: fp32 [N].
        bias: None or [N] of dtype `out_dtype`.
        out_dtype: float16, bfloat16, float32, or int32 for the bare sum (the scales are ignored, `bias` must be
            None).
        arch: CUDA only. 0: the best kernel for the device; 80: the `mma.sync` kernel (Ampere, Ada, and runs on
            Hopper); 90: the `wgmma` kernel (Hopper).
        weights_ready: CUDA only. A promise that no kernel of the stream that may still be running (the one before,
            and others where that one began before they ended) writes `w_packed`, as is always so when a trained
            model runs. The Hopper kernel then starts to load the weight while they still run. Everything else,
            `w_scale` too, is read after them.

    Returns:
        [M, N] of dtype `out_dtype`.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape, device or layout; the message names it.
        fastgemm.FastGemmError: the GPU library is missing or the launch failed.
    """
    _require_tensors(x=x, x_scale=x_scale, w_packed=w_packed, w_scale=w_scale)
    _require_bias_and_dtype(bias, out_dtype)
    return torch.ops.fastgemm.w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch, weights_ready)


def w8a8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    arch: int = 0,
    weights_ready: bool = False,
) -> torch.Tensor:
    """Product of per-token int8 activations and a per-channel int8 weight.

    As `w4a8_gemm`, with `w` an int8 [N, K] contiguous weight instead of a packed one.
    """
    _require_tensors(x=x, x_scale=x_scale, w=w, w_scale=w_scale)
    _require_bias_and_dtype(bias, out_dtype)
    return torch.ops.fastgemm.w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch, weights_ready)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric dynamic int8 quantization of each row.

    scale = absmax / 127 (1 for a row of zeros), q = clamp(rint(x / scale), -128, 127), both with IEEE fp32
    division and round-half-to-even: CUDA and CPU agree to the bit. A row that holds NaN or Inf gets a NaN or
    Inf scale, so that its products are not finite either; NaN elements themselves become 0.

    Args:
        x: float16, bfloat16 or float32 [M, K], K at least 1.

    Returns:
        (q, scale): int8 [M, K] and fp32 [M].

    Raises:
        TypeError, ValueError: `x` has a wrong dtype or shape.
    """
    _require_tensors(x=x)
    return torch.ops.fastgemm.quantize_per_token(x)


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm (optionally of x + residual) followed by `quantize_per_token`, in one pass.

    The rounding points are those of Transformers' LlamaRMSNorm in the dtype of `x`: h = x + residual is
    rounded to that dtype; the mean of h^2 and h * rsqrt(mean + eps) are fp32; the latter is rounded,
    multiplied with `weight`, and rounded again before it is quantized. Only the order of the fp32 sum of
    squares differs between implementations: it can move rsqrt by an ulp, a rounded value to its neighbour,
    and a quantized value by one step.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: [K], dtype of `x`.
        eps: added to the mean of squares.
        residual: None or [M, K], dtype of `x`.

    Returns:
        (q, scale, residual_out): int8 [M, K], fp32 [M], and x + residual in the dtype of `x` (`x` itself
        without a residual).

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    _require_tensors(x=x, weight=weight)
    if residual is None:
        q, scale = torch.ops.fastgemm.rms_norm_quant(x, weight, eps)
        return q, scale, x
    check_tensor("residual", residual, (x.dtype,), 2, x)
    return torch.ops.fastgemm.add_rms_norm_quant(x, residual, weight, eps)


def silu_mul_quant(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up followed by `quantize_per_token`, in one pass.

    The rounding points are those of Transformers' LlamaMLP in the dtype of `gate_up`: silu is computed in
    fp32 as g / (1 + exp(-g)) and rounded, the product with `up` is rounded again, then quantized. Only exp
    differs between implementations (by an ulp of fp32), which can move a rounded value to its neighbour and a
    quantized value by one step.

    Args:
        gate_up: float16, bfloat16 or float32 [M, 2 * I]: the gate's I columns first, then the up
        projection's.

    Returns:
        (q, scale): int8 [M, I] and fp32 [M].

    Raises:
        TypeError, ValueError: `gate_up` has a wrong dtype or shape.
    """
    _require_tensors(gate_up=gate_up)
    return torch.ops.fastgemm.silu_mul_quant(gate_up)


def _require_bias_and_dtype(bias: object, out_dtype: object) -> None:
    if bias is not None:
        _require_tensors(bias=bias)
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype, got {out_dtype!r}")


def _require_tensors(**arguments: object) -> None:
    # The dispatcher's own message for such arguments is a page long and does not name them.
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
