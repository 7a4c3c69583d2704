"""Argument checks shared by the CUDA, CPU and fake implementations of every operator.

Each check raises one exception that names the argument: TypeError for a wrong type or dtype, ValueError for a
wrong shape, size or device.
"""

import torch

from .packing import TILE_BYTES, check_weight_size, packed_shape

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int32)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHITECTURES = (0, 80, 90)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...], dim: int, like: torch.Tensor) -> None:
    """Check type, dtype, number of dimensions, strided layout, and that `t` is on the device of `like`."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(_name, dtypes))}, got {_name(t.dtype)}")
    if t.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension(s), got shape {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device} but the first argument is on {like.device}: move it there")


def _check_vector(name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...], length: int, like: torch.Tensor) -> None:
    check_tensor(name, t, dtypes, 1, like)
    if t.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}], got {list(t.shape)}")


def _check_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    arch: int,
) -> tuple[int, int]:
    check_tensor("x", x, (torch.int8,), 2, x)
    check_tensor("w_scale", w_scale, (torch.float32,), 1, x)
    n, k = w_scale.shape[0], x.shape[1]
    check_weight_size(n, k)
    _check_vector("x_scale", x_scale, (torch.float32,), x.shape[0], x)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype must be {' or '.join(map(_name, OUT_DTYPES))}, got {out_dtype}")
    if bias is not None:
        if out_dtype == torch.int32:
            raise ValueError("bias must be None with out_dtype int32 (the raw accumulator)")
        _check_vector("bias", bias, (out_dtype,), n, x)
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES} (0: the best one for the device), got {arch}")
    return n, k


def check_w4a8_gemm(x, x_scale, w_packed, w_scale, bias, out_dtype, arch=0) -> tuple[int, int]:
    """Check the arguments of `fastgemm.w4a8_gemm`; returns (N, K)."""
    n, k = _check_gemm(x, x_scale, w_scale, bias, out_dtype, arch)
    check_tensor("w_packed", w_packed, (torch.uint8,), 3, x)
    if tuple(w_packed.shape) != packed_shape(n, k):
        row_tiles, column_tiles, _ = packed_shape(n, k)
        raise ValueError(
            f"w_packed must have shape [{row_tiles}, {column_tiles}, {TILE_BYTES}] for N = {n} (of w_scale) "
            f"and K = {k} (of x), got {list(w_packed.shape)}"
        )
    _refuse_strided_weight("w_packed", w_packed)
    return n, k


def check_w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype, arch=0) -> tuple[int, int]:
    """Check the arguments of `fastgemm.w8a8_gemm`; returns (N, K)."""
    n, k = _check_gemm(x, x_scale, w_scale, bias, out_dtype, arch)
    check_tensor("w", w, (torch.int8,), 2, x)
    if tuple(w.shape) != (n, k):
        raise ValueError(f"w must have shape [{n}, {k}]: N from w_scale, K from x; got {list(w.shape)}")
    _refuse_strided_weight("w", w)
    return n, k


def _refuse_strided_weight(name: str, w: torch.Tensor) -> None:
    # A silent copy of a weight at every call would cost more than the product itself.
    if not w.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call .contiguous() once, when the weight is made")


def check_quantize_per_token(x: torch.Tensor) -> None:
    """Check the argument of `fastgemm.quantize_per_token`."""
    check_tensor("x", x, FLOAT_DTYPES, 2, x)
    _check_row_length("x", x.shape[1])


def check_rms_norm_quant(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> None:
    """Check the arguments of `fastgemm.rms_norm_quant`."""
    check_tensor("x", x, FLOAT_DTYPES, 2, x)
    _check_row_length("x", x.shape[1])
    _check_vector("weight", weight, (x.dtype,), x.shape[1], x)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), 2, x)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")


def check_silu_mul_quant(gate_up: torch.Tensor) -> None:
    """Check the argument of `fastgemm.silu_mul_quant`."""
    check_tensor("gate_up", gate_up, FLOAT_DTYPES, 2, gate_up)
    if gate_up.shape[1] % 2 != 0:
        raise ValueError(f"gate_up must have shape [M, 2 * I], got {list(gate_up.shape)}")
    _check_row_length("gate_up", gate_up.shape[1] // 2)


def _check_row_length(name: str, length: int) -> None:
    if length == 0:
        raise ValueError(f"{name} must have at least one column to quantize per token")
