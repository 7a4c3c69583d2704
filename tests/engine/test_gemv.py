"""The product of one token against float64, on a GPU; elsewhere it is the library's."""

from __future__ import annotations

import pytest
import torch

from odyssey.engine import gemv

SIZES = [(1, 8), (5, 96), (64, 1024), (515, 1000), (4096, 4096), (300, 11008), (32000, 512)]


def _problem(n, k, dtype, device, bias):
    generator = torch.Generator().manual_seed(n + k)
    x, w = (torch.randn(size, generator=generator).to(device, dtype) for size in ((1, k), (n, k)))
    return x, w, torch.randn(n, generator=generator).to(device, dtype) if bias else None


def _check(actual, x, w, bias):
    expected = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    # fp32 sums, rounded once: half a step of the dtype and what K additions of 2^-24 may lose.
    magnitude = x.double().abs() @ w.double().abs().t()
    tolerance = expected.abs() * torch.finfo(actual.dtype).eps + magnitude * x.shape[1] ** 0.5 * 2**-23
    assert ((actual.double() - expected).abs() <= tolerance + 1e-6).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_one_token_on_a_gpu(n, k, bias, dtype):
    if gemv.triton is None:
        pytest.skip("this build of PyTorch comes without Triton")
    x, w, b = _problem(n, k, dtype, "cuda", bias)
    assert gemv._takes(x, w)
    _check(gemv.linear(x, w, b), x, w, b)


@pytest.mark.gpu
def test_a_chain_in_a_graph_waits_for_its_inputs():
    """Each product starts to load before the one that writes its input has ended."""
    if gemv.triton is None:
        pytest.skip("this build of PyTorch comes without Triton")
    weights = [torch.randn(2048, 2048, device="cuda", dtype=torch.float16) / 45 for _ in range(6)]
    x = torch.randn(1, 2048, device="cuda", dtype=torch.float16)

    def chain():
        y = x
        for w in weights:
            y = gemv.linear(y, w, None)
        return y

    expected = chain().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = chain()
    for _ in range(20):
        actual.zero_()
        graph.replay()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_elsewhere_it_is_the_librarys_product(tokens):
    x, w, b = _problem(33, 70, torch.float32, "cpu", True)
    x = x.expand(tokens, -1).contiguous()
    assert torch.equal(gemv.linear(x, w, b), torch.nn.functional.linear(x, w, b))
