"""W4A16: products of float16 or bfloat16 activations with int4 weights that have one scale per group.

The weights of GPTQ and AWQ checkpoints, w[n, k] = (value[n, k] - zero[n, g]) * scale[n, g] with g = k // group_size.
Three backends, none of them a kernel of this package:

    humming     humming-kernels (compiled for the device on first use), compute capability 7.5 and newer
    torch       PyTorch's `_weight_int4pack_mm`: bfloat16, compute capability 8.0 and newer
    dequantize  the weight in 16 or 32 bits and an ordinary product: every device, no memory saved

`pack` chooses the first that takes the weight, on CPU always the last.
"""

import dataclasses
import functools
import importlib.util

import torch
import torch.nn.functional as F

from .checks import check_tensor

BACKENDS = ("humming", "torch", "dequantize")
DEFAULT_ZERO = 8
_TORCH_GROUP_SIZES = (256, 128, 64, 32)
_NIBBLES = 8  # int4 values in an int32 word
_BLOCK_VALUES = 2**24  # of a weight that are dequantized at a time


class UnsupportedError(ValueError):
    """A backend does not take this weight; the message is the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in the form of one backend; made by `pack`, used by `gemm`.

    Attributes:
        n, k: out_features and in_features.
        dtype: of the activations and of the product.
        device: where its tensors lie.
        backend: one of BACKENDS.
        group_size: columns that share a scale; k for one scale per output channel.
        tensors: the backend's tensors by name.
        config: humming only, its description of the product.
    """

    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    group_size: int
    tensors: dict[str, torch.Tensor]
    config: object = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def pack(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> PackedWeight:
    """Bring a quantized weight into the form of a backend.

    Args:
        values: uint8 [N, K] in 0..15.
        scales: float [N, G], G = ceil(K / group_size) groups along K.
        zeros: uint8 [N, G] in 0..15, or None where every zero point is 8.
        group_size: columns that share a scale and a zero point; -1 for all K.
        dtype: float16 or bfloat16 (float32 too with the backend dequantize): of activations, product and scales.
        device: where the packed weight goes; None: where `values` is.
        backend: one of BACKENDS; None: the first that takes the weight on this device.

    Returns:
        The packed weight. A humming weight has its kernels compiled, so that `gemm` can be captured in a graph.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or value, or the named backend cannot be used
            for it; the message says what is wrong.
    """
    check_tensor("values", values, (torch.uint8,), 2, values)
    n, k = values.shape
    if n == 0 or k == 0:
        raise ValueError(f"values must have at least one row and column, got shape {list(values.shape)}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for one scale per output channel, got {group_size}")
    group_size = k if group_size == -1 else min(group_size, k)
    groups = -(-k // group_size)
    check_tensor("scales", scales, (torch.float16, torch.bfloat16, torch.float32), 2, values)
    _check_groups("scales", scales, n, groups)
    if zeros is not None:
        check_tensor("zeros", zeros, (torch.uint8,), 2, values)
        _check_groups("zeros", zeros, n, groups)
    for name, t in (("values", values), ("zeros", zeros)):
        if t is not None and t.max() > 15:
            raise ValueError(f"{name} must lie in 0..15, got {int(t.max())}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = values.device if device is None else torch.device(device)
    if zeros is not None and bool((zeros == DEFAULT_ZERO).all()):
        zeros = None
    values, scales = values.to(device), scales.to(device)
    zeros = None if zeros is None else zeros.to(device)
    packers = {"humming": _pack_humming, "torch": _pack_torch, "dequantize": _pack_dequantized}
    for name in BACKENDS if backend is None else (backend,):
        try:
            tensors, config = packers[name](values, scales, zeros, group_size, dtype)
        except UnsupportedError as reason:
            if backend is not None:
                raise ValueError(f"backend {name!r} cannot be used: {reason}") from reason
            continue
        return PackedWeight(n, k, dtype, values.device, name, group_size, tensors, config)
    raise AssertionError("dequantize takes every weight")


def gemm(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias.

    Args:
        x: [M, K] of dtype `packed.dtype` on `packed.device`; M any number of tokens, also 0.
        packed: the weight [N, K] from `pack`.
        bias: None or [N] of the same dtype, added to the rounded product (dequantize: where `F.linear` adds it).

    Returns:
        [M, N] of the same dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device; the message names it.
    """
    check_tensor("x", x, (packed.dtype,), 2, x)
    if x.shape[1] != packed.k:
        raise ValueError(f"x must have shape [M, {packed.k}] for this weight, got {list(x.shape)}")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device} but the weight is on {packed.device}: move one of them")
    if bias is not None:
        check_tensor("bias", bias, (packed.dtype,), 1, x)
        if bias.shape[0] != packed.n:
            raise ValueError(f"bias must have shape [{packed.n}], got {list(bias.shape)}")
    if x.shape[0] == 0:
        return x.new_empty(0, packed.n)
    if packed.backend == "dequantize":
        return F.linear(x, packed.tensors["weight"], bias)
    if packed.backend == "torch":
        y = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16).contiguous(), packed.tensors["weight"], packed.config, packed.tensors["scales_zeros"]
        ).to(packed.dtype)
    else:
        from humming.forward import humming_forward

        y = humming_forward(packed.config, inputs=x.contiguous(), **packed.tensors)
    return y if bias is None else y.add_(bias)


def dequantize(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """(value - zero) * scale in fp32: [N, K], arguments as in `pack` (group_size K or less)."""
    k = values.shape[1]
    centred = values.to(torch.float32)
    zero = DEFAULT_ZERO if zeros is None else zeros.to(torch.float32).repeat_interleave(group_size, dim=1)[:, :k]
    return centred.sub_(zero).mul_(scales.to(torch.float32).repeat_interleave(group_size, dim=1)[:, :k])


def _check_groups(name: str, t: torch.Tensor, n: int, groups: int) -> None:
    if tuple(t.shape) != (n, groups):
        raise ValueError(f"{name} must have shape [{n}, {groups}]: N and the groups along K; got {list(t.shape)}")


def _pack_dequantized(values, scales, zeros, group_size, dtype):
    # Row blocks: the fp32 form of a whole weight would be eight times its packed size.
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, _BLOCK_VALUES // values.shape[1])
    for begin in range(0, values.shape[0], step):
        rows = slice(begin, begin + step)
        zero = None if zeros is None else zeros[rows]
        weight[rows] = dequantize(values[rows], scales[rows], zero, group_size).to(dtype)
    return {"weight": weight}, None


def _pack_torch(values, scales, zeros, group_size, dtype):
    n, k = values.shape
    if not values.is_cuda or torch.version.hip or torch.cuda.get_device_capability(values.device) < (8, 0):
        raise UnsupportedError("it needs an NVIDIA GPU of compute capability 8.0 or newer")
    if dtype == torch.float32:
        raise UnsupportedError("it computes in bfloat16: use float16 or bfloat16")
    # A scale for more columns than the kernel's largest group is repeated for each of its groups.
    fitting = [g for g in _TORCH_GROUP_SIZES if group_size % g == 0 and k % g == 0]
    if not fitting or n % 8 != 0 or k % 32 != 0:
        raise UnsupportedError(
            f"N = {n}, K = {k} and group size {group_size} must be multiples of 8, 32 and 32, K of a group"
        )
    group = fitting[0]
    scales = scales.to(torch.float32).repeat_interleave(group_size // group, dim=1)[:, : k // group]
    zero = torch.zeros_like(scales)
    if zeros is not None:
        shift = DEFAULT_ZERO - zeros.to(torch.float32).repeat_interleave(group_size // group, dim=1)[:, : k // group]
        zero = shift * scales
    tiles = next(t for t in (8, 4, 2) if k % (16 * t) == 0)
    pairs = (values[:, ::2] << 4) | values[:, 1::2]
    weight = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    scales_zeros = torch.stack([scales, zero], dim=2).transpose(0, 1).to(torch.bfloat16).contiguous()
    return {"weight": weight, "scales_zeros": scales_zeros}, group


@functools.cache
def _has_humming() -> bool:
    return importlib.util.find_spec("humming") is not None


def _int4_words(values: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C] in 0..15 -> int32 [R, C / 8], the first value of a word in its lowest bits."""
    nibbles = values.view(values.shape[0], -1, _NIBBLES).to(torch.int32)
    words = nibbles[..., 0].clone()
    for i in range(1, _NIBBLES):
        words |= nibbles[..., i] << 4 * i
    return words


def humming_weight(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    input_dtype: str | None = None,
) -> tuple[object, dict[str, torch.Tensor]]:
    """A weight in the form of humming-kernels, its kernels compiled: (description, tensors).

    Args:
        values, scales, zeros, group_size, dtype: as in `pack` (group_size K or less).
        input_dtype: humming's name of the activations' type, "int8" for W4A8; None: `dtype`.

    Raises:
        UnsupportedError: humming is not installed, or does not take the weight.
    """
    n, k = values.shape
    if not values.is_cuda or torch.cuda.get_device_capability(values.device) < (7, 5):
        raise UnsupportedError("it needs an NVIDIA GPU of compute capability 7.5 or newer")
    if not _has_humming():
        raise UnsupportedError("humming-kernels is not installed: pip install humming-kernels")
    if dtype == torch.float32:
        raise UnsupportedError("it computes in float16 or bfloat16")
    per_channel = group_size == k
    if n % 64 != 0 or k % 128 != 0 or (not per_channel and (group_size not in (32, 64, 128, 256) or k % group_size)):
        raise UnsupportedError(
            f"N = {n} and K = {k} must be multiples of 64 and 128, the group size {group_size} 32, 64, 128, 256 or K"
        )
    from humming import dtypes
    from humming.kernel.humming import HummingKernel
    from humming.schema.humming import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    tensors = {"weight": _int4_words(values), "weight_scale": scales.to(dtype).contiguous()}
    if zeros is not None:
        tensors["zero_point"] = _int4_words(zeros.t().contiguous()).t().contiguous()
    float_type = dtypes.DataType.from_torch_dtype(dtype)
    schema = HummingWeightSchema(
        b_dtype=dtypes.DataType.from_str("uint4"),
        bs_dtype=float_type,
        weight_scale_group_size=0 if per_channel else group_size,
        has_zero_point=zeros is not None,
    )
    inputs = HummingInputSchema(a_dtype=float_type if input_dtype is None else dtypes.DataType.from_str(input_dtype))
    with torch.cuda.device(values.device):
        config, tensors = prepare_and_transform_humming_tensors(
            tensors, n, k, schema, inputs, torch_dtype=dtype, device=values.device
        )
        HummingKernel.prepare_kernels(config.to_str(), device=values.device)
        # Synchronisation words of its split reductions, one set for each weight: layers may run on several streams.
        tensors["locks"] = torch.zeros(2048, dtype=torch.int32, device=values.device)
    return config, tensors


def _pack_humming(values, scales, zeros, group_size, dtype):
    config, tensors = humming_weight(values, scales, zeros, group_size, dtype)
    return tensors, config
