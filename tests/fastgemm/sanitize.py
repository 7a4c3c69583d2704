"""One small product on every Hopper kernel and split, for compute-sanitizer; exits with 1 on a wrong result.

    compute-sanitizer --tool memcheck  python tests/fastgemm/sanitize.py
    compute-sanitizer --tool racecheck python tests/fastgemm/sanitize.py         # all sizes
    compute-sanitizer --tool racecheck python tests/fastgemm/sanitize.py 400 97  # 97 to 400 tokens

The sizes make the plan choose each tile (8 to 256 tokens) with and without a split reduction, operands that pairs of
CTAs share, both lengths of a pipeline stage, and tails in M, N and K. Every other call promises that the weights are
ready.
"""

import sys
import time

import torch

import fastgemm

# (tokens, out_features, in_features)
SIZES = [
    *((1, 80, k) for k in (96, 256, 544, 768, 1056, 2048)),
    *((13, 80, k) for k in (96, 256, 544, 768, 1056, 2048)),
    *((30, 80, k) for k in (96, 768, 1056, 2048)),
    *((59, 80, k) for k in (96, 544, 2048)),
    *((65, 80, k) for k in (96, 1056, 2048)),
    *((m, 4112, k) for m in (1, 13, 30) for k in (544, 1024)),
    (1, 9232, 4096),
    (1, 25616, 4096),
    (130, 80, 1056),
    (300, 2064, 1056),
    (385, 1040, 2048),
    (385, 4112, 96),
    (300, 8208, 96),
    (385, 8208, 96),
    (128, 17040, 544),
    (200, 17040, 2048),
    (60, 17040, 96),
    (65, 17040, 544),
    (65, 8208, 2048),
    (257, 4112, 96),
    (130, 17040, 544),
    (200, 17040, 544),
    (300, 2064, 4096),
    (385, 17040, 1056),
    (385, 8208, 2048),
]


def check(bits: int, m: int, n: int, k: int, ready: bool) -> bool:
    """Whether W4A8 or W8A8 products of this size are exact as int32 and as scaled fp16."""
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8, generator=generator)
    x_scale, w_scale = torch.rand(m, generator=generator), torch.rand(n, generator=generator)
    stored = fastgemm.pack(w) if bits == 4 else w
    function = fastgemm.w4a8_gemm if bits == 4 else fastgemm.w8a8_gemm
    on_gpu = [t.cuda() for t in (x, x_scale, stored, w_scale)]
    exact = True
    for dtype in (torch.int32, torch.float16):
        expected = function(x, x_scale, stored, w_scale, None, dtype)
        got = function(*on_gpu, None, dtype, weights_ready=ready)
        exact = exact and torch.equal(got.cpu(), expected)
    return exact


def main() -> int:
    """Run every size with both weight widths; returns the exit code."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else max(m for m, _, _ in SIZES)
    least = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    wrong = []
    start = time.monotonic()
    for index, (m, n, k) in enumerate(s for s in SIZES if least <= s[0] <= most):
        wrong += [(bits, m, n, k) for bits in (4, 8) if not check(bits, m, n, k, index % 2 == 1)]
        print(f"{time.monotonic() - start:6.1f} s: {m} tokens, {n} x {k}", flush=True)
    print(f"wrong results: {wrong}" if wrong else "all products exact")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
