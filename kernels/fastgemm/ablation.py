"""Products that FastGEMM is compared with: what it saves by being per-channel, symmetric and fused.

OdysseyLLM (arXiv 2311.09550, section 4.4 and its kernel comparison) argues that fine-grained scales, zero points and a
separate unpacking step are what make W4A8 slow. These functions run exactly those in the kernels of `w4a8_gemm`, the
Hopper one and the mma.sync one: compare at the same `arch`. CUDA only; not torch operators; for benchmarks, not for
models.
"""

from ctypes import c_int

import torch

from .checks import ARCHITECTURES, FLOAT_DTYPES, check_tensor
from .cuda import _DTYPE_CODES, _WEIGHTS_READY, _aligned
from .library import load
from .ops import w8a8_gemm
from .packing import check_weight_size, pack, packed_shape

GROUP_SIZE = 128
# The Hopper kernel's accumulators hold 16 times the sum of K products with unsigned weights.
MAX_ASYMMETRIC_K = 65536
_KINDS = {"grouped": 0, "asymmetric": 1}


def pack_unsigned(w: torch.Tensor) -> torch.Tensor:
    """Pack unsigned int4 values (uint8 [N, K] in 0..15) in the layout of `pack`, nibble for nibble.

    Raises:
        TypeError, ValueError: `w` has a wrong dtype, shape or value.
    """
    if w.dtype != torch.uint8:
        raise TypeError(f"w must be a uint8 tensor, got {w.dtype}")
    if w.numel() and int(w.max()) > 15:
        raise ValueError(f"w must hold values in 0..15, found {int(w.max())}")
    # Bit 3 as the sign: 8..15 become -8..-1, which have the same four bits.
    return pack((w ^ 8).to(torch.int8) - 8)


def _check(x, x_scale, w_packed, n: int, out_dtype: torch.dtype, arch: int, plan) -> int:
    check_tensor("x", x, (torch.int8,), 2, x)
    k = x.shape[1]
    check_weight_size(n, k)
    check_tensor("x_scale", x_scale, (torch.float32,), 1, x)
    if x_scale.shape[0] != x.shape[0]:
        raise ValueError(f"x_scale must have shape [{x.shape[0]}], got {list(x_scale.shape)}")
    check_tensor("w_packed", w_packed, (torch.uint8,), 3, x)
    if tuple(w_packed.shape) != packed_shape(n, k):
        raise ValueError(f"w_packed must have shape {list(packed_shape(n, k))}, got {list(w_packed.shape)}")
    if not w_packed.is_contiguous() or w_packed.data_ptr() % 16 != 0:
        raise ValueError("w_packed must be contiguous and 16-byte aligned")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES} (0: the best one for the device), got {arch}")
    if plan is not None and (arch == 80 or len(plan) != 3):
        raise ValueError(f"plan must be (warpgroups, tokens, split) of a Hopper kernel, got {plan} with arch {arch}")
    return k


def _require_cuda(x: torch.Tensor) -> None:
    if not x.is_cuda:
        raise ValueError(f"x must be on a CUDA device, got {x.device}")


def _launch(kind, tensors, m, n, k, out_dtype, arch, weights_ready, plan) -> torch.Tensor:
    """tensors: the operands in the order of the C function; None is NULL. The first is x."""
    library = load()
    function = library.ablation_grouped_gemm if kind == "grouped" else library.ablation_asymmetric_gemm
    x = tensors[0]
    out = x.new_empty(m, n, dtype=out_dtype)
    forced = None if plan is None else (c_int * 3)(*plan)
    with torch.cuda.device(x.device):
        size = library.ablation_workspace_bytes(_KINDS[kind], m, n, k, arch)
        workspace = x.new_empty(max(size, 1), dtype=torch.uint8)
        function(
            *(None if t is None else t.data_ptr() for t in tensors),
            out.data_ptr(),
            m,
            n,
            k,
            _DTYPE_CODES[out_dtype],
            workspace.data_ptr(),
            size,
            arch + weights_ready * _WEIGHTS_READY,
            forced,
            torch.cuda.current_stream().cuda_stream,
        )
    return out


def w4a8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w_packed: torch.Tensor,
    group_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.float16,
    *,
    arch: int = 0,
    weights_ready: bool = False,
    plan: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Fine-grained W4A8: each group of 128 columns has its own scale, applied to its int32 sum in fp32.

    y[m, n] = x_scale[m] * sum_g group_scale[g, n] * sum_(k in g) x[m, k] * w[n, k], groups added in order in fp32, in
    parts where the reduction is split. Another plan, or another `arch`, may round differently.

    Args:
        x: int8 [M, K], K a multiple of 128.
        x_scale: fp32 [M].
        w_packed: uint8, as `pack` returns it.
        group_scale: fp32 [K / 128, N].
        out_dtype: float16, bfloat16 or float32.
        arch: as that of `w4a8_gemm`: 0 is the best kernel for the device, 80 mma.sync, 90 Hopper's wgmma.
        weights_ready: as that of `w4a8_gemm`; holds for `group_scale`, too.
        plan: (warpgroups, tokens, split) of a Hopper kernel in place of the chosen one, for tests and sweeps.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape, device or layout.
        FastGemmError: the device has no such kernel, or there is none with this plan.
    """
    check_tensor("group_scale", group_scale, (torch.float32,), 2, x)
    n = group_scale.shape[1]
    k = _check(x, x_scale, w_packed, n, out_dtype, arch, plan)
    if k % GROUP_SIZE != 0:
        raise ValueError(f"K must be a multiple of {GROUP_SIZE}, got {k}")
    if group_scale.shape[0] != k // GROUP_SIZE:
        raise ValueError(f"group_scale must have shape [{k // GROUP_SIZE}, {n}], got {list(group_scale.shape)}")
    _require_cuda(x)
    scales = _aligned(group_scale)
    ready = weights_ready and scales is group_scale  # the kernel just before writes a copy
    tensors = [_aligned(x), _aligned(x_scale), w_packed, scales]
    return _launch("grouped", tensors, x.shape[0], n, k, out_dtype, arch, ready, plan)


def w4a8_asymmetric_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w_packed: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor,
    out_dtype: torch.dtype = torch.float16,
    *,
    x_sum: torch.Tensor | None = None,
    arch: int = 0,
    weights_ready: bool = False,
    plan: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Asymmetric W4A8: every channel has a zero point.

    y[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] * (w[n, k] - w_zero[n]), the sum exact in int32. The mma.sync
    kernel subtracts the zero point from every weight before the product, the Hopper kernel subtracts
    w_zero[n] * sum_k x[m, k] from the sum.

    Args:
        x: int8 [M, K].
        x_scale: fp32 [M].
        w_packed: uint8, as `pack_unsigned` returns it.
        w_scale: fp32 [N].
        w_zero: uint8 [N] in 0..15.
        out_dtype: float16, bfloat16 or float32.
        x_sum: int32 [M], sum_k x[m, k], which a quantizer has while it writes x; None: a kernel of its own finds it,
            where it is needed.
        arch: as that of `w4a8_gemm`: 0 is the best kernel for the device, 80 mma.sync, 90 Hopper's wgmma. K is at most
            65536 unless it is 80.
        weights_ready: as that of `w4a8_gemm`; holds for `w_scale` and `w_zero`, too.
        plan: (warpgroups, tokens, split) of a Hopper kernel in place of the chosen one, for tests and sweeps.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape, device or layout.
        FastGemmError: the device has no such kernel, or there is none with this plan.
    """
    check_tensor("w_scale", w_scale, (torch.float32,), 1, x)
    n = w_scale.shape[0]
    k = _check(x, x_scale, w_packed, n, out_dtype, arch, plan)
    if arch != 80 and k > MAX_ASYMMETRIC_K:
        raise ValueError(f"K must be at most {MAX_ASYMMETRIC_K} unless arch is 80, got {k}")
    check_tensor("w_zero", w_zero, (torch.uint8,), 1, x)
    if w_zero.shape[0] != n:
        raise ValueError(f"w_zero must have shape [{n}], got {list(w_zero.shape)}")
    if x_sum is not None:
        check_tensor("x_sum", x_sum, (torch.int32,), 1, x)
        if x_sum.shape[0] != x.shape[0]:
            raise ValueError(f"x_sum must have shape [{x.shape[0]}], got {list(x_sum.shape)}")
        x_sum = x_sum.contiguous()
    _require_cuda(x)
    scales, zeros = w_scale.contiguous(), w_zero.contiguous()
    ready = weights_ready and scales is w_scale and zeros is w_zero  # the kernel just before writes a copy
    tensors = [_aligned(x), _aligned(x_scale), x_sum, w_packed, scales, zeros]
    return _launch("asymmetric", tensors, x.shape[0], n, k, out_dtype, arch, ready, plan)


def hopper_plan(kind: str, m: int, n: int, k: int, *, weights_ready: bool = False) -> tuple[int, int, int]:
    """(warpgroups, tokens, split) that a product of this size uses on the current device, which has wgmma.

    Args:
        kind: "grouped" or "asymmetric".

    Raises:
        ValueError: unknown kind.
        FastGemmError: the device has no Hopper kernel.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind}")
    plan = (c_int * 4)()
    load().ablation_plan(_KINDS[kind], m, n, k, weights_ready * _WEIGHTS_READY, plan)
    return plan[0], plan[1], plan[2]


def unpack_on_device(w_packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """`unpack` as one kernel: int8 [n, k] of a packed weight on a CUDA device.

    Raises:
        ValueError: `w_packed` has a wrong shape or device.
    """
    check_weight_size(n, k)
    if not w_packed.is_cuda or w_packed.dtype != torch.uint8 or not w_packed.is_contiguous():
        raise ValueError("w_packed must be a contiguous uint8 tensor on a CUDA device")
    if tuple(w_packed.shape) != packed_shape(n, k):
        raise ValueError(f"w_packed must have shape {list(packed_shape(n, k))}, got {list(w_packed.shape)}")
    w = torch.empty(n, k, dtype=torch.int8, device=w_packed.device)
    with torch.cuda.device(w_packed.device):
        stream = torch.cuda.current_stream().cuda_stream
        load().ablation_unpack(w_packed.data_ptr(), w.data_ptr(), n, k, stream)
    return w


def w4a8_unfused_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w_packed: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.float16,
    *,
    arch: int = 0,
) -> torch.Tensor:
    """W4A8 in two kernels: the weight is unpacked to int8 in memory, then multiplied by `w8a8_gemm`.

    Arguments as those of `w4a8_gemm`.
    """
    w = unpack_on_device(w_packed, w_scale.shape[0], x.shape[1])
    return w8a8_gemm(x, x_scale, w, w_scale, None, out_dtype, arch=arch)
