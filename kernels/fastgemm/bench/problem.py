"""The operands of one benchmarked product, the same for every kernel, and its exact result on some rows."""

import torch

from ..ops import quantize_per_token

MAX_CHECKED_ROWS = 16
UNIFORM_INT4_STD = (56 / 3) ** 0.5  # of the integers -7..7
_REFERENCE_BLOCK = 4096  # output features at a time in float64


class Weights:
    """A random weight [n, k] on the GPU: int4 and int8 with one fp32 scale per output channel, and fp16.

    The int4 values are uniform in [-7, 7]. The fp16 weight is normally distributed with the standard deviation of the
    dequantized int4 weight of its channel: its mantissas are full, as those of a trained fp16 weight are. Values on a
    4- or 8-bit grid toggle fewer bits of the multipliers, and a kernel at the power limit runs 5-10 % faster on them.
    """

    def __init__(self, n: int, k: int, seed: int = 0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.n, self.k = n, k
        self.int8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        self.int4 = torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        # Powers of two are exact in every format, so all kernels multiply with the same weight.
        exponents = torch.randint(-9, -6, (n,), device="cuda", generator=generator)
        self.scale = torch.exp2(exponents.float())
        self.fp16 = torch.empty(n, k, dtype=torch.float16, device="cuda").normal_(generator=generator)
        self.fp16 *= (self.scale * UNIFORM_INT4_STD).half()[:, None]

    def rows(self, bits: int, rows: slice) -> torch.Tensor:
        """Some rows of the weight of 4, 8 or 16 bits in float64."""
        if bits == 16:
            return self.fp16[rows].double()
        return (self.int4 if bits == 4 else self.int8)[rows].double() * self.scale[rows].double()[:, None]


class Activations:
    """m random tokens of k features on the GPU: normal in fp16 and bf16, quantized to int8 for the others, with what a
    quantizer knows of each token: its scale and the sum of its int8 values."""

    def __init__(self, m: int, k: int, seed: int = 1):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.m, self.k = m, k
        self.fp16 = torch.randn(m, k, device="cuda", generator=generator).half()
        self.bf16 = self.fp16.bfloat16()
        self.int8, self.scale = quantize_per_token(self.fp16)
        self.sum = self.int8.sum(1, dtype=torch.int32)
        self.padded = torch.nn.functional.pad(self.int8, (0, 0, 0, max(0, 32 - m)))
        rows = torch.randperm(m, generator=generator, device="cuda")[: MAX_CHECKED_ROWS - 2]
        self.checked_rows = torch.unique(torch.cat([rows, rows.new_tensor([0, m - 1])]))


def relative_error(y: torch.Tensor, weights: Weights, bits: int, x: Activations, quantized: bool) -> float:
    """||y - exact|| / ||exact|| over a sample of rows (first, last, random), against float64.

    Args:
        y: [m, n] of any dtype.
        bits: width of the weight that was multiplied with.
        quantized: whether the int8 activations were multiplied, else the fp16 ones.
    """
    rows = x.checked_rows
    tokens = x.int8[rows].double() * x.scale[rows].double()[:, None] if quantized else x.fp16[rows].double()
    difference = total = 0.0
    for begin in range(0, weights.n, _REFERENCE_BLOCK):
        block = slice(begin, begin + _REFERENCE_BLOCK)
        exact = tokens @ weights.rows(bits, block).t()
        difference += float((y[rows, block].double() - exact).square().sum())
        total += float(exact.square().sum())
    return (difference / total) ** 0.5
