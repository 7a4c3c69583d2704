"""The kernels that can be compared: ours, those of torch, and those of libraries that happen to be installed.

A kernel prepares a weight once (not timed) and then multiplies activations with it (timed). Quantizing the
activations is not part of any kernel's time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ablation, ops, w4a16
from ..packing import pack
from .cutlass import peer as cutlass
from .problem import Activations, Weights

W4A16_GROUP_SIZE = 128


class UnavailableError(RuntimeError):
    """This kernel cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Kernel:
    """One competitor.

    Attributes:
        name: as given to `--against`.
        weight_bits: width of the weight values it multiplies with.
        stored_bits: bits per weight read from memory, scales left out.
        math: "int8" or "fp16", the tensor-core rate that limits it.
        prepare: makes its form of the weight; raises UnavailableError.
        multiply: the timed call, (prepared weight, activations) -> [m, n].
        check: refuses, before anything is measured, where the kernel was asked for and cannot be had.
        tune: chooses among the kernel's variants for some activations before they are timed: (prepared weights used
            in turn, activations) -> the call to time instead of `multiply`, and what was found, for the record.
        tolerance: largest relative error that counts as correct.
        note: what the figure means, or what differs from our product; for the report.
    """

    name: str
    weight_bits: int
    stored_bits: float
    math: str
    prepare: Callable[[Weights], object]
    multiply: Callable[[object, Activations], torch.Tensor]
    check: Callable[[], None] | None = None
    tune: Callable[[list, Activations], tuple[Callable, dict[str, object]]] | None = None
    tolerance: float = 1e-3
    note: str = ""

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation value."""
        return 1 if self.math == "int8" else 2


def _fastgemm(**options) -> dict:
    return {
        "weight_bits": 4,
        "stored_bits": 4,
        "math": "int8",
        "prepare": lambda w: (pack(w.int4), w.scale.clone()),
        "multiply": lambda w, x: ops.w4a8_gemm(x.int8, x.scale, *w, **options),
    }


def _w8a8(**options) -> dict:
    return {
        "weight_bits": 8,
        "stored_bits": 8,
        "math": "int8",
        "prepare": lambda w: (w.int8.clone(), w.scale.clone()),
        "multiply": lambda w, x: ops.w8a8_gemm(x.int8, x.scale, *w, **options),
    }


def _prepare_grouped(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    if w.k % ablation.GROUP_SIZE != 0:
        raise UnavailableError(f"needs K to be a multiple of {ablation.GROUP_SIZE}")
    return pack(w.int4), w.scale[None, :].repeat(w.k // ablation.GROUP_SIZE, 1)


def _prepare_asymmetric(w: Weights) -> tuple[torch.Tensor, ...]:
    unsigned = (w.int4 + 8).to(torch.uint8)
    return ablation.pack_unsigned(unsigned), w.scale.clone(), torch.full_like(w.scale, 8, dtype=torch.uint8)


def _grouped(**options) -> dict:
    return {
        "weight_bits": 4,
        "stored_bits": 4 + 32 / ablation.GROUP_SIZE,
        "math": "int8",
        "prepare": _prepare_grouped,
        "multiply": lambda w, x: ablation.w4a8_grouped_gemm(x.int8, x.scale, *w, **options),
    }


def _asymmetric(**options) -> dict:
    return {
        "weight_bits": 4,
        "stored_bits": 4,
        "math": "int8",
        "prepare": _prepare_asymmetric,
        "multiply": lambda w, x: ablation.w4a8_asymmetric_gemm(x.int8, x.scale, *w, x_sum=x.sum, **options),
    }


def _int_mm(w: tuple[torch.Tensor, torch.Tensor], x: Activations) -> torch.Tensor:
    # torch refuses 16 rows and fewer; a caller has to pad, so the padding's product is part of the time.
    tokens = x.int8 if x.m > 16 else x.padded
    return torch._int_mm(tokens, w[0].t())[: x.m]


def _prepare_int_mm(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    return w.int8.clone(), w.scale


def _prepare_w4a16(backend: str) -> Callable[[Weights], w4a16.PackedWeight]:
    dtype = torch.bfloat16 if backend == "torch" else torch.float16

    def prepare(w: Weights) -> w4a16.PackedWeight:
        scales = w.scale[:, None].repeat(1, -(-w.k // W4A16_GROUP_SIZE))
        try:
            return w4a16.pack((w.int4 + 8).to(torch.uint8), scales, None, W4A16_GROUP_SIZE, dtype, backend=backend)
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    return prepare


def _prepare_humming(w: Weights) -> tuple[object, dict[str, torch.Tensor]]:
    try:
        return w4a16.humming_weight((w.int4 + 8).to(torch.uint8), w.scale[:, None], None, w.k, torch.float16, "int8")
    except w4a16.UnsupportedError as error:
        raise UnavailableError(str(error)) from error


def _multiply_humming(w: tuple[object, dict[str, torch.Tensor]], x: Activations) -> torch.Tensor:
    from humming.forward import humming_forward

    config, tensors = w
    return humming_forward(config, inputs=x.int8, input_scale=x.scale[:, None], **tensors)


_READY = "called with weights_ready: the weight is loaded while the preceding launch finishes, as in inference"
_KERNELS = [
    Kernel("fastgemm", **_fastgemm()),
    Kernel("fastgemm-ready", **_fastgemm(weights_ready=True), note=_READY),
    Kernel("fastgemm-sm80", **_fastgemm(arch=80), note="the mma.sync kernel"),
    Kernel("w8a8", **_w8a8()),
    Kernel("w8a8-ready", **_w8a8(weights_ready=True), note=_READY),
    Kernel("w8a8-sm80", **_w8a8(arch=80), note="the mma.sync kernel"),
    Kernel(
        "cublas-fp16",
        weight_bits=16,
        stored_bits=16,
        math="fp16",
        prepare=lambda w: w.fp16.clone(),
        multiply=lambda w, x: torch.mm(x.fp16, w.t()),
        tolerance=2e-3,
        note="normally distributed fp16 operands",
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
        stored_bits=4 + 32 / W4A16_GROUP_SIZE,
        math="fp16",
        prepare=_prepare_w4a16("torch"),
        multiply=lambda w, x: w4a16.gemm(x.bf16, w),
        tolerance=1e-2,
        note="torch's own W4A16 (tinygemm), bf16, group size 128",
    ),
    Kernel(
        "w4a16-humming",
        weight_bits=4,
        stored_bits=4 + 16 / W4A16_GROUP_SIZE,
        math="fp16",
        prepare=_prepare_w4a16("humming"),
        multiply=lambda w, x: w4a16.gemm(x.fp16, w),
        note="humming-kernels W4A16, fp16, group size 128, its default tuning",
    ),
    Kernel("grouped", **_grouped(), note="ablation: one scale per 128 columns; compare with fastgemm"),
    Kernel("grouped-sm80", **_grouped(arch=80), note="ablation: grouped by mma.sync; compare with fastgemm-sm80"),
    Kernel(
        "asymmetric",
        **_asymmetric(),
        note="ablation: zero points; the tokens' sums come with their scales, from the quantization that no row's time "
        "contains; compare with fastgemm",
    ),
    Kernel(
        "asymmetric-sm80",
        **_asymmetric(arch=80),
        note="ablation: zero points subtracted from every weight, by mma.sync; compare with fastgemm-sm80",
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
        multiply=_multiply_humming,
        note="humming-kernels W4A8, its default tuning",
    ),
    Kernel(
        "cutlass-w8a8",
        weight_bits=8,
        stored_bits=8,
        math="int8",
        prepare=lambda w: (w.int8.clone(), w.scale.clone()),
        multiply=cutlass.multiply,
        check=cutlass.check,
        tune=cutlass.tune,
        note="CUTLASS, the fastest plan of a tuning pass before timing; vLLM's configurations are among them",
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
