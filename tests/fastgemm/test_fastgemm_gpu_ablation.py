"""The kernels FastGEMM is compared with are right, too: any GPU, then every kernel of the Hopper variants."""

import pytest
import torch
from fastgemm_ablation_cases import (
    FEW_TOKENS,
    HOPPER_TILES,
    exact_grouped,
    group_ranges,
    group_sums,
    operands,
    rounded_grouped,
    splits,
)

import fastgemm
from fastgemm import ablation
from fastgemm.library import FastGemmError

SIZES = [(1, 80, 128), (9, 272, 384), (17, 96, 1024), (40, 1040, 2048), (65, 144, 256), (200, 272, 1152)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def has_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


hopper = pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")


def unsigned_operands(m, n, k, seed=0):
    """x, x_scale, w uint8 in 0..15, w_scale, w_zero; K is a multiple of 32."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, **options)
    w = torch.randint(0, 16, (n, k), dtype=torch.uint8, **options)
    zero = torch.randint(0, 16, (n,), dtype=torch.uint8, **options)
    return x, (torch.rand(m, **options) + 0.1) / 32, w, torch.rand(n, **options) + 0.1, zero


def asymmetric_reference(x, x_scale, w, w_scale, zero):
    """The product with an exact integer sum and the two fp32 roundings of the scales."""
    sums = x.double() @ (w.double() - zero.double()[:, None]).t()
    return (sums.float() * x_scale[:, None]) * w_scale


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [0, 80])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_grouped_product(m, n, k, arch):
    x, x_scale, w, group_scale, _ = operands(m, n, k, device="cuda")
    packed = fastgemm.pack(w)
    expected = exact_grouped(group_sums(x, w), group_scale, x_scale)
    y = ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, torch.float32, arch=arch)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(y, ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, torch.float32, arch=arch))


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [0, 80])
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (3, 48, 32), (33, 16, 96)])
def test_asymmetric_product_is_exact(m, n, k, arch):
    x, x_scale, w, w_scale, zero = unsigned_operands(m, n, k)
    y = ablation.w4a8_asymmetric_gemm(
        x, x_scale, ablation.pack_unsigned(w), w_scale, zero, out_dtype=torch.float32, arch=arch
    )
    assert torch.equal(y, asymmetric_reference(x, x_scale, w, w_scale, zero))


@pytest.mark.gpu
@hopper
def test_the_largest_zero_point_sums_fit():
    """Every product of the longest K is 128 * 15: the accumulators come within 7 % of -2^31."""
    k = ablation.MAX_ASYMMETRIC_K
    x = torch.full((3, k), -128, dtype=torch.int8, device="cuda")
    w = torch.full((16, k), 15, dtype=torch.uint8, device="cuda")
    zero = torch.arange(16, dtype=torch.uint8, device="cuda")
    ones = torch.ones(16, device="cuda")
    y = ablation.w4a8_asymmetric_gemm(x, ones[:3], ablation.pack_unsigned(w), ones, zero, out_dtype=torch.float32)
    assert torch.equal(y, (-128.0 * k * (15 - zero.float())).repeat(3, 1))


def tiled_sizes(tokens):
    """Sizes with tails in every dimension: a few tiles, shared by a cluster each; whole tiles before shared ones."""
    few = tokens <= FEW_TOKENS
    m = tokens - 1 if few else tokens + 5
    rows = 17040 if few else 8528  # a little more than one tile for each multiprocessor
    return [(m, 144, 1408), (m, 80, 1792), (m, rows, 640)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", HOPPER_TILES)
def test_every_grouped_kernel_rounds_as_specified(tile):
    for m, n, k in tiled_sizes(tile[1]):
        x, x_scale, w, group_scale, _ = operands(m, n, k, device="cuda")
        packed, sums = fastgemm.pack(w), group_sums(x, w)
        whole = rounded_grouped(sums, group_scale, x_scale, [(0, k // 128)])
        for split in splits(tile[1]):
            shared = rounded_grouped(sums, group_scale, x_scale, group_ranges(tile, split, k))
            for dtype in DTYPES:
                for ready in (False, True):
                    options = {"plan": (*tile, split), "weights_ready": ready}
                    y = ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, dtype, **options)
                    # Tiles in full waves are not split.
                    right = (y == shared.to(dtype)) | (y == whole.to(dtype))
                    assert bool(right.all()), ((m, n, k), options, dtype, int((~right).sum()))
                    repeated = ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, dtype, **options)
                    assert torch.equal(y, repeated), ((m, n, k), options, dtype)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tile", HOPPER_TILES)
def test_every_asymmetric_kernel_is_exact(tile):
    for m, n, k in [*tiled_sizes(tile[1]), (min(tile[1], 40), 48, 96)]:
        x, x_scale, w, w_scale, zero = unsigned_operands(m, n, k)
        packed, x_sum = ablation.pack_unsigned(w), x.sum(1, dtype=torch.int32)
        expected = asymmetric_reference(x, x_scale, w, w_scale, zero)
        for split in splits(tile[1]):
            for dtype in DTYPES:
                for ready, given in ((False, x_sum), (True, x_sum), (True, None)):
                    options = {"plan": (*tile, split), "weights_ready": ready, "x_sum": given}
                    y = ablation.w4a8_asymmetric_gemm(x, x_scale, packed, w_scale, zero, dtype, **options)
                    assert torch.equal(y, expected.to(dtype)), ((m, n, k), tile, split, dtype, ready, given is None)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("m", "n", "k"), [(5, 272, 1152), (40, 1040, 1664), (200, 656, 896)])
def test_hopper_and_mma_sync_agree_where_neither_splits(m, n, k):
    x, x_scale, w, group_scale, _ = operands(m, n, k, device="cuda")
    packed = fastgemm.pack(w)
    tile = next(t for t in HOPPER_TILES if t[1] >= min(m, 128))
    y = ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, torch.float32, plan=(*tile, 1))
    other = ablation.w4a8_grouped_gemm(x, x_scale, packed, group_scale, torch.float32, arch=80)
    assert torch.equal(y, other)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("kind", ["grouped", "asymmetric"])
def test_the_chosen_plan_is_one_that_runs(kind):
    for m in (1, 9, 17, 33, 65, 100, 200, 400, 5000):
        for n, k in ((1024, 2048), (4096, 11008), (22016, 4096)):
            for ready in (False, True):
                *tile, split = ablation.hopper_plan(kind, m, n, k, weights_ready=ready)
                assert tuple(tile) in HOPPER_TILES
                assert split in splits(tile[1])
                assert tile[1] > FEW_TOKENS or m <= tile[1]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("plan", [(2, 8, 1), (2, 24, 1), (3, 64, 1), (2, 64, 3), (2, 64, 5), (2, 64, 0), (2, 64, 16)])
def test_plans_without_a_kernel_are_refused(plan):
    x, x_scale, w, group_scale, _ = operands(9, 16, 128, device="cuda")
    with pytest.raises(FastGemmError, match="code 2"):
        ablation.w4a8_grouped_gemm(x, x_scale, fastgemm.pack(w), group_scale, plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(16, 32), (80, 96), (64, 64), (1040, 352)])
def test_unpacking_kernel_and_unfused_product(n, k):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    x = torch.randint(-128, 128, (5, k), dtype=torch.int8, **options)
    x_scale, w_scale = torch.rand(5, **options) + 0.1, torch.rand(n, **options) + 0.1
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, **options)
    packed = fastgemm.pack(w)
    assert torch.equal(ablation.unpack_on_device(packed, n, k), w)
    y = ablation.w4a8_unfused_gemm(x, x_scale, packed, w_scale)
    assert torch.equal(y, fastgemm.w4a8_gemm(x, x_scale, packed, w_scale))
