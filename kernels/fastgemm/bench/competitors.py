"""The kernels that can be compared: ours, those of torch, and those of libraries that happen to be installed.

A kernel prepares a weight once (not timed) and then multiplies activations with it (timed). Quantizing the
activations is not part of any kernel's time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ablation, ops
from ..packing import pack
from .problem import Activations, Weights


class UnavailableError(RuntimeError):
    """This kernel cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Kernel:
    """One competitor.

    Attributes:
        name: as given to `--against`.
        weight_bits: width of the weight values it multiplies with (16: the 8-bit values held in fp16 or bf16).
        stored_bits: bits per weight read from memory, scales left out.
        math: "int8" or "fp16", the tensor-core rate that limits it.
        prepare: makes its form of the weight; raises UnavailableError.
        multiply: the timed call, (prepared weight, activations) -> [m, n].
        tolerance: largest relative error that counts as correct.
        note: what differs from our product, for the report.
    """

    name: str
    weight_bits: int
    stored_bits: float
    math: str
    prepare: Callable[[Weights], object]
    multiply: Callable[[object, Activations], torch.Tensor]
    tolerance: float = 1e-3
    note: str = ""

    @property
    def value_bits(self) -> int:
        """Width of the integer grid its weight lies on."""
        return 4 if self.weight_bits == 4 else 8

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation value."""
        return 1 if self.math == "int8" else 2


def _fastgemm(arch: int) -> dict:
    return {
        "weight_bits": 4,
        "stored_bits": 4,
        "math": "int8",
        "prepare": lambda w: (pack(w.int4), w.scale.clone()),
        "multiply": lambda w, x: ops.w4a8_gemm(x.int8, x.scale, *w, arch=arch),
    }


def _w8a8(arch: int) -> dict:
    return {
        "weight_bits": 8,
        "stored_bits": 8,
        "math": "int8",
        "prepare": lambda w: (w.int8.clone(), w.scale.clone()),
        "multiply": lambda w, x: ops.w8a8_gemm(x.int8, x.scale, *w, arch=arch),
    }


def _prepare_grouped(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    if w.k % ablation.GROUP_SIZE != 0:
        raise UnavailableError(f"needs K to be a multiple of {ablation.GROUP_SIZE}")
    return pack(w.int4), w.scale[None, :].repeat(w.k // ablation.GROUP_SIZE, 1)


def _prepare_asymmetric(w: Weights) -> tuple[torch.Tensor, ...]:
    unsigned = (w.int4 + 8).to(torch.uint8)
    return ablation.pack_unsigned(unsigned), w.scale.clone(), torch.full_like(w.scale, 8, dtype=torch.uint8)


def _int_mm(w: tuple[torch.Tensor, torch.Tensor], x: Activations) -> torch.Tensor:
    # torch refuses 16 rows and fewer; a caller has to pad, so the padding's product is part of the time.
    tokens = x.int8 if x.m > 16 else x.padded
    return torch._int_mm(tokens, w[0].t())[: x.m]


def _prepare_int_mm(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    return w.int8.clone(), w.scale


def _prepare_tinygemm(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    if w.k % 128 != 0:
        raise UnavailableError("needs K to be a multiple of 128")
    values = (w.int4 + 8).to(torch.uint8)
    pairs = (values[:, ::2] << 4) | values[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    scale = w.scale.bfloat16()[None, :].expand(w.k // 128, w.n)
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()


def _prepare_humming(w: Weights) -> torch.nn.Module:
    try:
        from humming.layer import HummingLayer
    except ImportError as error:
        raise UnavailableError(f"humming-kernels is not installed ({error})") from error
    layer = HummingLayer(
        shape_n=w.n,
        shape_k=w.k,
        weight_config={"dtype": "int4"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.float16,
    ).cuda()
    layer.load_from_unquantized(w.dequantized(4, torch.float16))
    layer.transform()
    return layer


_KERNELS = [
    Kernel("fastgemm", **_fastgemm(0)),
    Kernel("fastgemm-sm80", **_fastgemm(80), note="the mma.sync kernel"),
    Kernel("w8a8", **_w8a8(0)),
    Kernel("w8a8-sm80", **_w8a8(80), note="the mma.sync kernel"),
    Kernel(
        "cublas-fp16",
        weight_bits=16,
        stored_bits=16,
        math="fp16",
        prepare=lambda w: w.dequantized(8, torch.float16),
        multiply=lambda w, x: torch.mm(x.fp16, w.t()),
    ),
    Kernel(
        "int-mm",
        weight_bits=8,
        stored_bits=8,
        math="int8",
        prepare=_prepare_int_mm,
        multiply=_int_mm,
        note="torch._int_mm: int32 output without scales, M padded to 32 below 17",
    ),
    Kernel(
        "w4a16",
        weight_bits=4,
        stored_bits=4 + 32 / 128,
        math="fp16",
        prepare=_prepare_tinygemm,
        multiply=lambda w, x: torch.ops.aten._weight_int4pack_mm(x.bf16, w[0], 128, w[1]),
        tolerance=1e-2,
        note="torch's own W4A16 (tinygemm), bf16, group size 128",
    ),
    Kernel(
        "grouped",
        weight_bits=4,
        stored_bits=4 + 32 / ablation.GROUP_SIZE,
        math="int8",
        prepare=_prepare_grouped,
        multiply=lambda w, x: ablation.w4a8_grouped_gemm(x.int8, x.scale, *w),
        note="ablation: one scale per 128 columns; compare with fastgemm-sm80",
    ),
    Kernel(
        "asymmetric",
        weight_bits=4,
        stored_bits=4,
        math="int8",
        prepare=_prepare_asymmetric,
        multiply=lambda w, x: ablation.w4a8_asymmetric_gemm(x.int8, x.scale, *w),
        note="ablation: zero points; compare with fastgemm-sm80",
    ),
    Kernel(
        "unfused",
        weight_bits=4,
        stored_bits=4,
        math="int8",
        prepare=lambda w: (pack(w.int4), w.scale.clone()),
        multiply=lambda w, x: ablation.w4a8_unfused_gemm(x.int8, x.scale, *w),
        note="ablation: unpacked to int8 by a kernel of its own, then w8a8; compare with fastgemm",
    ),
    Kernel(
        "humming",
        weight_bits=4,
        stored_bits=4,
        math="int8",
        prepare=_prepare_humming,
        multiply=lambda layer, x: layer(x.int8, input_scale=x.scale[:, None]),
        note="humming-kernels W4A8, its default tuning",
    ),
]
KERNELS = {kernel.name: kernel for kernel in _KERNELS}
BASELINE = "cublas-fp16"


def select(names: list[str]) -> list[Kernel]:
    """Kernels by name, the fp16 baseline among them.

    Raises:
        ValueError: unknown name.
    """
    unknown = [n for n in names if n not in KERNELS]
    if unknown:
        raise ValueError(f"unknown kernel {', '.join(unknown)}: choose from {', '.join(KERNELS)}")
    return [KERNELS[n] for n in dict.fromkeys([*names, BASELINE])]


def as_output(kernel: Kernel, y: torch.Tensor, w: Weights, x: Activations) -> torch.Tensor:
    """The kernel's result as the product that is checked: scales applied where the kernel leaves them out."""
    if kernel.name == "int-mm":
        return y.double() * x.scale.double()[:, None] * w.scale.double()
    return y
