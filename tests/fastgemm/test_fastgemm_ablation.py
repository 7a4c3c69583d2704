"""What of the ablation needs no GPU: argument checks, packing, and the references of the GPU tests."""

from itertools import pairwise

import pytest
import torch
from fastgemm_ablation_cases import (
    GROUP,
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


def test_unsigned_packing_keeps_the_nibbles():
    w = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    assert torch.equal(fastgemm.unpack(ablation.pack_unsigned(w), 16, 32).to(torch.uint8) & 15, w)
    with pytest.raises(ValueError, match="found 16"):
        ablation.pack_unsigned(w + 1)
    with pytest.raises(TypeError, match="uint8"):
        ablation.pack_unsigned(w.to(torch.int8))


def grouped_arguments(m=2, n=16, k=256):
    packed = fastgemm.pack(torch.zeros(n, k, dtype=torch.int8))
    return torch.zeros(m, k, dtype=torch.int8), torch.ones(m), packed, torch.ones(k // GROUP, n)


def asymmetric_arguments(m=2, n=16, k=256):
    x, x_scale, packed, _ = grouped_arguments(m, n, k)
    return x, x_scale, packed, torch.ones(n), torch.zeros(n, dtype=torch.uint8)


@pytest.mark.parametrize("arch", [0, 80, 90])
def test_cpu_tensors_are_refused(arch):
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        ablation.w4a8_grouped_gemm(*grouped_arguments(), arch=arch)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        ablation.w4a8_asymmetric_gemm(*asymmetric_arguments(), arch=arch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": 89}, "arch must be one of"),
        ({"plan": (2, 8)}, "plan must be"),
        ({"plan": (2, 8, 1), "arch": 80}, "plan must be .* with arch 80"),
    ],
)
def test_kernels_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ablation.w4a8_grouped_gemm(*grouped_arguments(), **options)
    with pytest.raises(ValueError, match=message):
        ablation.w4a8_asymmetric_gemm(*asymmetric_arguments(), **options)


def test_arguments_of_the_grouped_product():
    x, x_scale, packed, scale = grouped_arguments()
    with pytest.raises(ValueError, match=r"group_scale must have shape \[2, 16\], got \[1, 16\]"):
        ablation.w4a8_grouped_gemm(x, x_scale, packed, scale[:1])
    with pytest.raises(TypeError, match="out_dtype"):
        ablation.w4a8_grouped_gemm(x, x_scale, packed, scale, torch.int32)
    with pytest.raises(ValueError, match="K must be a multiple of 128, got 160"):
        ablation.w4a8_grouped_gemm(
            x[:, :160], x_scale, fastgemm.pack(torch.zeros(16, 160, dtype=torch.int8)), scale[:1]
        )
    with pytest.raises(ValueError, match=r"x_scale must have shape \[2\], got \[1\]"):
        ablation.w4a8_grouped_gemm(x, x_scale[:1], packed, scale)


def test_arguments_of_the_asymmetric_product():
    x, x_scale, packed, scale, zero = asymmetric_arguments()
    with pytest.raises(ValueError, match=r"w_zero must have shape \[16\], got \[15\]"):
        ablation.w4a8_asymmetric_gemm(x, x_scale, packed, scale, zero[:-1])
    with pytest.raises(TypeError, match="x_sum must be int32, got int64"):
        ablation.w4a8_asymmetric_gemm(x, x_scale, packed, scale, zero, x_sum=x.sum(1))
    with pytest.raises(ValueError, match=r"x_sum must have shape \[2\], got \[1\]"):
        ablation.w4a8_asymmetric_gemm(x, x_scale, packed, scale, zero, x_sum=torch.zeros(1, dtype=torch.int32))
    large = asymmetric_arguments(1, 16, ablation.MAX_ASYMMETRIC_K + 64)
    with pytest.raises(ValueError, match="K must be at most 65536 unless arch is 80, got 65600"):
        ablation.w4a8_asymmetric_gemm(*large)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        ablation.w4a8_asymmetric_gemm(*large, arch=80)


@pytest.mark.parametrize("arranged", [lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.repeat(1, 2)[:, :16]])
def test_scales_are_ready_only_where_they_are_not_copied(monkeypatch, arranged):
    """A copy is what the kernel before the product writes, whatever the caller promises of the original."""
    launched = []
    monkeypatch.setattr(ablation, "_require_cuda", lambda x: None)
    monkeypatch.setattr(ablation, "_launch", lambda kind, tensors, *rest: launched.append((tensors[3], rest[-2])))
    x, x_scale, packed, scale = grouped_arguments()
    scale = arranged(torch.rand_like(scale))
    for promised in (False, True):
        ablation.w4a8_grouped_gemm(x, x_scale, packed, scale, weights_ready=promised)
        given, ready = launched.pop()
        assert torch.equal(given, scale)
        assert given.is_contiguous()
        assert ready == (promised and given is scale)


@pytest.mark.parametrize("copied", ["neither", "w_scale", "w_zero"])
def test_zero_points_are_ready_only_where_nothing_is_copied(monkeypatch, copied):
    launched = []
    monkeypatch.setattr(ablation, "_require_cuda", lambda x: None)
    monkeypatch.setattr(ablation, "_launch", lambda kind, tensors, *rest: launched.append(rest[-2]))
    x, x_scale, packed, scale, zero = asymmetric_arguments()
    if copied == "w_scale":
        scale = scale.repeat_interleave(2)[::2]
    elif copied == "w_zero":
        zero = zero.repeat_interleave(2)[::2]
    for promised in (False, True):
        ablation.w4a8_asymmetric_gemm(x, x_scale, packed, scale, zero, weights_ready=promised)
        assert launched.pop() == (promised and copied == "neither")


def test_a_plan_is_of_a_known_kind():
    with pytest.raises(ValueError, match="kind must be one of grouped, asymmetric"):
        ablation.hopper_plan("per-channel", 1, 16, 128)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 32, 384), (9, 48, 1152)])
def test_group_sums_are_exact(m, n, k):
    x, _, w, _, _ = operands(m, n, k)
    direct = (x.long()[:, None, :] * w.long()[None]).view(m, n, -1, GROUP).sum(-1)
    assert torch.equal(group_sums(x, w).long(), direct.permute(2, 0, 1))


@pytest.mark.parametrize("tile", HOPPER_TILES)
@pytest.mark.parametrize("k", [128, 384, 1152, 1792])
def test_the_rounded_reference_is_near_the_exact_one_for_every_split(tile, k):
    x, x_scale, w, scale, _ = operands(7, 48, k)
    sums = group_sums(x, w)
    exact = exact_grouped(sums, scale, x_scale)
    for split in splits(tile[1]):
        ranges = group_ranges(tile, split, k)
        assert (ranges[0][0], ranges[-1][1]) == (0, k // GROUP)
        assert all(begin < end for begin, end in ranges)
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        y = rounded_grouped(sums, scale, x_scale, ranges)
        assert float((y.double() - exact).norm() / exact.norm()) < 1e-6
