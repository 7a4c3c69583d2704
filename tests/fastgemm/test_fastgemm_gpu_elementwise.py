"""The CUDA quantization kernels against the CPU implementations and the unfused torch sequences."""

import pytest
import torch
import torch.nn.functional as F

import fastgemm
from fastgemm.library import load

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Every way the kernels keep a row: one to four vectors a thread, rows read again, odd tails.
LENGTHS = [1, 8, 31, 64, 100, 4096, 5000, 8192, 11008, 16384, 28672, 32768, 65536, 65544, 4099]


def rows(m, k, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", generator=generator)
    return (x * torch.logspace(-5, 3, m, device="cuda")[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS)
def test_quantize_per_token_equals_the_cpu_to_the_bit(dtype, k):
    x = rows(9, k, dtype)
    x[2] = 0
    x[4] = torch.arange(k, device="cuda") % 255 - 127  # exact quotients
    x[5] = torch.arange(k, device="cuda") % 255 / 2 - 63.5  # exact ties
    x[6] *= 1e-7
    q, scale = fastgemm.quantize_per_token(x)
    expected_q, expected_scale = fastgemm.quantize_per_token(x.cpu())
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(q.cpu(), expected_q)


def test_quantize_every_half_value_with_awkward_scales():
    values = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    for limit in (65504.0, 127.0, 3.0, 1e-3, 6e-8, 0.3334):
        x = values[values.abs() <= limit][None].float()
        for scaled in (x, x * 1e-36, x * 1e-41, x * 1e30):
            q, scale = fastgemm.quantize_per_token(scaled.contiguous())
            expected_q, expected_scale = fastgemm.quantize_per_token(scaled.cpu())
            assert torch.equal(scale.cpu(), expected_scale)
            assert torch.equal(q.cpu(), expected_q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 100, 8192, 65536])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_rows_are_not_hidden(dtype, k, bad):
    x = torch.randn(3, k, device="cuda").to(dtype)
    x[1, k // 2] = bad
    q, scale = fastgemm.quantize_per_token(x)
    expected_q, expected_scale = fastgemm.quantize_per_token(x.cpu())
    assert torch.equal(q.cpu(), expected_q)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0, equal_nan=True)
    finite = [True, False, True]
    assert torch.isfinite(fastgemm.silu_mul_quant(torch.cat([x, x], 1))[1]).tolist() == finite
    assert torch.isfinite(fastgemm.rms_norm_quant(x, torch.ones_like(x[0]), 1e-6)[1]).tolist() == finite


def assert_within_one_step(got, expected, dtype):
    """Equal up to the documented difference: neighbouring rounded values, one quantization step."""
    (q, scale), (expected_q, expected_scale) = got, expected
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-21}[dtype]
    torch.testing.assert_close(scale, expected_scale, rtol=1.01 * unit, atol=0)
    difference = (q.int() - expected_q.int()).abs()
    # A neighbouring bfloat16 is up to 2^-7 of the value away: half a step at the row's end, so two steps with
    # the scale's own neighbour.
    assert difference.max() <= (2 if dtype == torch.bfloat16 else 1)
    assert (difference != 0).float().mean() < (0.02 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS[1:])
def test_rms_norm_quant_follows_the_unfused_modules(dtype, k, with_residual):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = rows(6, k, dtype)
    residual = rows(6, k, dtype, seed=1) if with_residual else None
    norm = LlamaRMSNorm(k, eps=1e-5).to(device="cuda", dtype=dtype)
    norm.weight.data = torch.randn(k, device="cuda").to(dtype)
    h = x if residual is None else residual + x
    q, scale, h_out = fastgemm.rms_norm_quant(x, norm.weight.data, 1e-5, residual)
    assert torch.equal(h_out, h)
    assert_within_one_step((q, scale), fastgemm.quantize_per_token(norm(h).detach()), dtype)


@pytest.mark.parametrize("k", [4096, 65544])
def test_rms_norm_quant_may_update_the_residual_in_place(k):
    x, residual = rows(5, k, torch.float16), rows(5, k, torch.float16, seed=1)
    weight = torch.randn(k, device="cuda").half()
    expected = fastgemm.rms_norm_quant(x, weight, 1e-5, residual)
    q, scale = torch.empty_like(expected[0]), torch.empty_like(expected[1])
    load().rms_norm_quant(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        1e-5,
        0,
        residual.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        5,
        k,
        torch.cuda.current_stream().cuda_stream,
    )
    for got, want in zip((q, scale, residual), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS)
def test_silu_mul_quant_follows_the_unfused_sequence(dtype, k):
    gate_up = torch.cat([rows(6, k, torch.float32), rows(6, k, torch.float32, seed=1).flip(0)], 1).to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    expected = fastgemm.quantize_per_token(F.silu(gate) * up)
    assert_within_one_step(fastgemm.silu_mul_quant(gate_up), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS)
def test_silu_mul_with_and_without_quantization_and_for_few_and_many_rows(dtype, k):
    gate_up = torch.cat([rows(40, k, torch.float32), rows(40, k, torch.float32, seed=1).flip(0)], 1).to(dtype)
    y = fastgemm.silu_mul(gate_up)
    q, scale = fastgemm.quantize_per_token(y)
    # Few rows are shared by the blocks of a cluster each; nothing depends on the order of a maximum.
    for m in (1, 5, 32, 40):
        assert torch.equal(fastgemm.silu_mul(gate_up[:m]), y[:m])
        got_q, got_scale = fastgemm.silu_mul_quant(gate_up[:m])
        assert torch.equal(got_q, q[:m])
        assert torch.equal(got_scale, scale[:m])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_mul_of_every_gate(dtype):
    """All 65536 bit patterns, against float64: half a unit of the result and the fp32 steps before it."""
    gate = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype)
    y = fastgemm.silu_mul(torch.stack([gate, torch.ones_like(gate)], 0).view(1, -1))[0]
    x = gate.double()
    exact = x / (1 + torch.exp(-x))
    assert torch.equal(y.isnan(), exact.isnan())
    exact, got = exact[~exact.isnan()], y[~exact.isnan()].double()
    finite = exact.to(dtype).isfinite()
    assert torch.equal(got[~finite], exact.to(dtype)[~finite].double())
    info = torch.finfo(dtype)
    # exp(88.7) leaves fp32, and the result is then 0 where it should be at least 88.7 exp(-88.7).
    smallest = max(info.smallest_normal * info.eps, 2e-37)
    unit = exact[finite].abs() * info.eps / 2 + smallest
    assert ((got[finite] - exact[finite]).abs() <= unit * 1.01).all()
    # The quantizing kernels compute the same: a row of one vector, and one that the blocks of a cluster share.
    for columns in (8, 8192):
        rows_of_gates = y.view(-1, columns)
        fused = fastgemm.silu_mul_quant(torch.cat([gate.view(-1, columns), torch.ones_like(rows_of_gates)], 1))
        for one, other in zip(fused, fastgemm.quantize_per_token(rows_of_gates), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS)
def test_rms_norm_with_and_without_quantization(dtype, k, with_residual):
    x, residual = rows(6, k, dtype), rows(6, k, dtype, seed=1) if with_residual else None
    weight = torch.randn(k, device="cuda").to(dtype)
    y, h = fastgemm.rms_norm(x, weight, 1e-5, residual)
    q, scale, expected_h = fastgemm.rms_norm_quant(x, weight, 1e-5, residual)
    assert torch.equal(h, expected_h)
    for got, want in zip(fastgemm.quantize_per_token(y), (q, scale), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_misaligned_views_and_no_rows(dtype):
    x = rows(3000, 72, dtype)
    view = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3000, 72)
    expected = fastgemm.quantize_per_token(x.cpu())
    for candidate in (x, view):
        for got, want in zip(fastgemm.quantize_per_token(candidate), expected, strict=True):
            assert torch.equal(got.cpu(), want)
    assert fastgemm.quantize_per_token(x[:0])[0].shape == (0, 72)
    assert fastgemm.silu_mul_quant(x[:0])[0].shape == (0, 36)
    strided = x.repeat(1, 2)[:, 36:108]
    q, _ = fastgemm.quantize_per_token(strided)
    assert torch.equal(q, fastgemm.quantize_per_token(strided.contiguous())[0])


def test_captured_in_a_cuda_graph_on_a_side_stream():
    x = rows(4, 4096, torch.float16)
    weight = torch.ones(4096, device="cuda", dtype=torch.float16)
    fastgemm.rms_norm_quant(x, weight, 1e-6, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        q, scale, h = fastgemm.rms_norm_quant(x, weight, 1e-6, x)
        q2, scale2 = fastgemm.silu_mul_quant(h)
    x.copy_(rows(4, 4096, torch.float16, seed=3))
    graph.replay()
    expected = fastgemm.rms_norm_quant(x, weight, 1e-6, x)
    for got, want in zip((q, scale, h), expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip((q2, scale2), fastgemm.silu_mul_quant(expected[2]), strict=True):
        assert torch.equal(got, want)
