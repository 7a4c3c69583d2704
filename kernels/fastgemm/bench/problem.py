"""The operands of one benchmarked product, the same for every kernel, and its exact result on some rows."""

import torch

from ..ops import quantize_per_token

MAX_CHECKED_ROWS = 16
_REFERENCE_BLOCK = 4096  # output features at a time in float64


class Weights:
    """A random weight [n, k] in int4 and int8 with one fp32 scale per output channel, on the GPU.

    The int4 values lie in [-7, 7] and every row reaches both ends, so that a symmetric quantizer with the divisor
    7 finds the same grid again when it is given the dequantized weight.
    """

    def __init__(self, n: int, k: int, seed: int = 0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.n, self.k = n, k
        self.int8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        self.int4 = torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        self.int4[:, 0], self.int4[:, 1] = 7, -7
        # Powers of two are exact in every format, so all kernels multiply with the same weight.
        exponents = torch.randint(-9, -6, (n,), device="cuda", generator=generator)
        self.scale = torch.exp2(exponents.float())

    def integers(self, bits: int) -> torch.Tensor:
        """int8 tensor [n, k] of 4- or 8-bit values."""
        return self.int4 if bits == 4 else self.int8

    def dequantized(self, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """[n, k] in `dtype`; exact in float16, and in bfloat16 too."""
        return self.integers(bits).to(dtype) * self.scale[:, None].to(dtype)


class Activations:
    """m random tokens of k features: int8, and the same values in fp16 and bf16, on the GPU."""

    def __init__(self, m: int, k: int, seed: int = 1):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.m, self.k = m, k
        self.int8, _ = quantize_per_token(torch.randn(m, k, device="cuda", generator=generator))
        # A power of two again, so that the fp16 activations are exactly the quantized ones.
        self.scale = torch.full((m,), 2.0**-6, device="cuda")
        self.fp16 = self.int8.half() * 2.0**-6
        self.bf16 = self.int8.bfloat16() * 2.0**-6
        self.padded = torch.nn.functional.pad(self.int8, (0, 0, 0, max(0, 32 - m)))
        rows = torch.randperm(m, generator=generator, device="cuda")[: MAX_CHECKED_ROWS - 2]
        self.checked_rows = torch.unique(torch.cat([rows, rows.new_tensor([0, m - 1])]))


def relative_error(y: torch.Tensor, weights: Weights, bits: int, x: Activations) -> float:
    """||y - exact|| / ||exact|| over a sample of rows (first, last, random), against float64.

    Args:
        y: [m, n] of any dtype.
        bits: width of the weight that was multiplied with.
    """
    rows = x.checked_rows
    tokens = x.int8[rows].double() * x.scale[rows].double()[:, None]
    difference = total = 0.0
    for begin in range(0, weights.n, _REFERENCE_BLOCK):
        block = slice(begin, begin + _REFERENCE_BLOCK)
        w = weights.integers(bits)[block].double() * weights.scale[block].double()[:, None]
        exact = tokens @ w.t()
        difference += float((y[rows, block].double() - exact).square().sum())
        total += float(exact.square().sum())
    return (difference / total) ** 0.5
