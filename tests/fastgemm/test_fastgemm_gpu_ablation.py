"""The kernels FastGEMM is compared with are right, too."""

import pytest
import torch

import fastgemm
from fastgemm import ablation

SIZES = [(1, 80, 128), (9, 272, 384), (17, 96, 1024), (40, 1040, 2048), (65, 144, 256), (200, 272, 1152)]


def operands(m, n, k, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, **options)
    return x, torch.rand(m, **options) + 0.1, torch.rand(n, **options) + 0.1, generator


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_grouped_product(m, n, k):
    x, x_scale, _, generator = operands(m, n, k)
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    group_scale = torch.rand(k // 128, n, device="cuda", generator=generator)
    y = ablation.w4a8_grouped_gemm(x, x_scale, fastgemm.pack(w), group_scale, torch.float32)
    scaled = w.double() * group_scale.double().repeat_interleave(128, dim=0).t()
    expected = (x.double() @ scaled.t()) * x_scale.double()[:, None]
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-6
    repeated = ablation.w4a8_grouped_gemm(x, x_scale, fastgemm.pack(w), group_scale, torch.float32)
    assert torch.equal(y, repeated)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (3, 48, 32), (33, 16, 96)])
def test_asymmetric_product_is_exact(m, n, k):
    x, x_scale, w_scale, generator = operands(m, n, k)
    x_scale.fill_(1)
    w_scale.fill_(1)
    w = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    zero = torch.randint(0, 16, (n,), dtype=torch.uint8, device="cuda", generator=generator)
    y = ablation.w4a8_asymmetric_gemm(x, x_scale, ablation.pack_unsigned(w), w_scale, zero, out_dtype=torch.float32)
    assert torch.equal(y.double(), x.double() @ (w.double() - zero.double()[:, None]).t())


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(16, 32), (80, 96), (64, 64), (1040, 352)])
def test_unpacking_kernel_and_unfused_product(n, k):
    x, x_scale, w_scale, generator = operands(5, n, k)
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    packed = fastgemm.pack(w)
    assert torch.equal(ablation.unpack_on_device(packed, n, k), w)
    y = ablation.w4a8_unfused_gemm(x, x_scale, packed, w_scale)
    assert torch.equal(y, fastgemm.w4a8_gemm(x, x_scale, packed, w_scale))


def test_unsigned_packing_keeps_the_nibbles():
    w = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    assert torch.equal(fastgemm.unpack(ablation.pack_unsigned(w), 16, 32).to(torch.uint8) & 15, w)
    with pytest.raises(ValueError, match="found 16"):
        ablation.pack_unsigned(w + 1)
    with pytest.raises(TypeError, match="uint8"):
        ablation.pack_unsigned(w.to(torch.int8))


def test_cpu_tensors_are_refused():
    x, scale = torch.zeros(2, 128, dtype=torch.int8), torch.ones(2)
    packed = fastgemm.pack(torch.zeros(16, 128, dtype=torch.int8))
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        ablation.w4a8_grouped_gemm(x, scale, packed, torch.ones(1, 16))
