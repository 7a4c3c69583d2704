"""The decoder's operators on a CPU: float64 references, Transformers' modules, PyTorch's attention, refusals."""

import pytest
import torch
import torch.nn.functional as F
from fastgemm_attention_cases import UNIT, assert_rounded, attend, problem, rotary_table, rotate, split_heads
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgemm

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS = [(4, 4, 64), (8, 2, 128), (8, 1, 32), (3, 3, 6)]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_transformers_and_the_quantizing_operator(dtype, with_residual, rng):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(7, 512, generator=rng).to(dtype)
    residual = torch.randn(7, 512, generator=rng).to(dtype) if with_residual else None
    norm = LlamaRMSNorm(512, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(512, generator=rng).to(dtype)
    y, h = fastgemm.rms_norm(x, norm.weight.data, 1e-5, residual)
    assert torch.equal(h, x if residual is None else residual + x)
    assert torch.equal(y, norm(h).detach())
    q, scale, _ = fastgemm.rms_norm_quant(x, norm.weight.data, 1e-5, residual)
    assert all(map(torch.equal, fastgemm.quantize_per_token(y), (q, scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_equals_torch_and_the_quantizing_operator(dtype, rng):
    gate_up = (torch.randn(7, 1024, generator=rng) * 3).to(dtype)
    y = fastgemm.silu_mul(gate_up)
    assert torch.equal(y, F.silu(gate_up[:, :512]) * gate_up[:, 512:])
    assert all(map(torch.equal, fastgemm.quantize_per_token(y), fastgemm.silu_mul_quant(gate_up)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), HEADS)
def test_rope_append_rotates_and_stores(dtype, num_heads, kv_heads, head_dim):
    p = problem([0, 0, 0], num_heads, kv_heads, head_dim, 40, dtype)
    rows = torch.tensor([0, 0, 2, 1, 2], dtype=torch.int32)
    positions = torch.tensor([3, 4, 39, 0, 17], dtype=torch.int32)
    qkv = torch.randn(5, p.qkv.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    out = fastgemm.rope_append(qkv, p.cos_sin, positions, rows, p.k_cache, p.v_cache, num_heads)
    q, k, v = split_heads(qkv, num_heads, kv_heads)
    angles = p.cos_sin[positions.long()]
    assert_rounded(out, rotate(q, angles), dtype)
    for t, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        assert_rounded(p.k_cache[row, :, position], rotate(k, angles)[t], dtype)
        assert torch.equal(p.v_cache[row, :, position], v[t])
        p.k_cache[row, :, position] = p.v_cache[row, :, position] = torch.nan
    assert p.k_cache.isnan().all()
    assert p.v_cache.isnan().all()


def test_rope_agrees_with_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(100)[None])
    table = torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=1)
    p = problem([0], 4, 2, 64, 100, torch.float32)
    positions = torch.tensor([0, 1, 55, 99], dtype=torch.int32)
    qkv = torch.randn(4, p.qkv.shape[1], generator=torch.Generator().manual_seed(1))
    rows = torch.zeros(4, dtype=torch.int32)
    out = fastgemm.rope_append(qkv, table, positions, rows, p.k_cache, p.v_cache, 4)
    q, k, _ = (t.transpose(0, 1)[None] for t in split_heads(qkv, 4, 2))
    q, k = apply_rotary_pos_emb(q, k, cos[:, positions.long()], sin[:, positions.long()])
    torch.testing.assert_close(out, q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.k_cache[0][:, positions.long()], k[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention_equals_float64(dtype, num_heads, kv_heads, head_dim, window):
    p = problem([0, 1, 5, 63], num_heads, kv_heads, head_dim, 64, dtype)
    arguments = p.arguments()
    out = fastgemm.decode_attention(*arguments, window=window)
    # A rotated query that fp32 puts on the other side of a tie moves its scores by a fraction of a unit.
    assert_rounded(out, attend(p, window=window), dtype, slack=2**-19 if dtype == torch.float32 else UNIT[dtype] / 4)
    q, scale = fastgemm.decode_attention_quant(*p.arguments(), window=window)
    assert all(map(torch.equal, fastgemm.quantize_per_token(out), (q, scale)))
    _, k, v = split_heads(p.qkv, num_heads, kv_heads)
    for row, length in enumerate(p.lengths.tolist()):
        for cache, before in ((arguments[3], p.k_cache), (arguments[4], p.v_cache)):
            assert torch.equal(cache[row, :, :length], before[row, :, :length])
            assert cache[row, :, length + 1 :].isnan().all()
        assert torch.equal(arguments[4][row, :, length], v[row])
        assert_rounded(arguments[3][row, :, length], rotate(k, p.cos_sin[p.lengths.long()])[row], dtype)


def test_decode_attention_agrees_with_pytorch_and_takes_a_scale():
    p = problem([30, 30], 4, 4, 64, 31, torch.float32)
    arguments = p.arguments()
    out = fastgemm.decode_attention(*arguments, softmax_scale=0.3)
    q = rotate(split_heads(p.qkv, 4, 4)[0], p.cos_sin[[30, 30]]).float()
    expected = F.scaled_dot_product_attention(q[:, :, None], arguments[3], arguments[4], scale=0.3)
    torch.testing.assert_close(out, expected[:, :, 0].flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), attend(p, softmax_scale=0.3), rtol=1e-5, atol=1e-5)


def test_prefill_then_decode_equals_attention_over_the_whole_sequence():
    num_heads, kv_heads, head_dim, length = 4, 2, 64, 12
    qkv = torch.randn(length, (num_heads + 2 * kv_heads) * head_dim, generator=torch.Generator().manual_seed(3))
    table = rotary_table(16, head_dim)
    caches = [torch.full((1, kv_heads, 16, head_dim), torch.nan) for _ in range(2)]
    indices = torch.arange(length - 1, dtype=torch.int32)
    fastgemm.rope_append(qkv[:-1], table, indices, torch.zeros_like(indices), *caches, num_heads)
    lengths = torch.tensor([length - 1], dtype=torch.int32)
    out = fastgemm.decode_attention(qkv[-1:], table, lengths, *caches, num_heads)
    q, k, v = split_heads(qkv, num_heads, kv_heads)
    q, k = rotate(q, table[:length]), rotate(k, table[:length])
    q, k, v = (t.double().transpose(0, 1)[None] for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.double(), expected[:, :, -1].flatten(1), rtol=1e-5, atol=1e-5)


def operator_cases():
    ops = torch.ops.fastgemm
    x, weight = torch.randn(5, 64), torch.ones(64)
    p = problem([0, 3, 9], 4, 2, 8, 10, torch.float32)
    for cache in (p.k_cache, p.v_cache):
        cache.nan_to_num_()
    indices = torch.tensor([0, 2, 1], dtype=torch.int32)
    append = (p.qkv, p.cos_sin, indices, indices, p.k_cache, p.v_cache, 4)
    return {
        "rms_norm": (ops.rms_norm, (x, weight, 1e-6)),
        "add_rms_norm": (ops.add_rms_norm, (x, x + 1, weight, 1e-6)),
        "silu_mul": (ops.silu_mul, (x,)),
        "rope_append": (ops.rope_append, append),
        "decode_attention": (ops.decode_attention, p.arguments()),
        "decode_attention_quant": (ops.decode_attention_quant, (*p.arguments(), 0.5, 4)),
        "decode_attention_cache_ready": (ops.decode_attention, (*p.arguments(), None, None, True)),
        "decode_attention_quant_cache_ready": (ops.decode_attention_quant, (*p.arguments(), None, 4, True)),
    }


@pytest.mark.parametrize("attention", [fastgemm.decode_attention, fastgemm.decode_attention_quant])
def test_a_ready_cache_changes_nothing_on_a_cpu(attention):
    p = problem([0, 3, 9], 4, 2, 8, 10, torch.float16)
    plain, ready = p.arguments(), p.arguments()
    expected, got = attention(*plain), attention(*ready, cache_ready=True)
    for one, other in ((expected, got), (plain[3:5], ready[3:5])):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", list(operator_cases()))
def test_opcheck(name):
    operator, arguments = operator_cases()[name]
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("arranged", [lambda t: t, lambda t: t.t().contiguous().t()])
@pytest.mark.parametrize("name", list(operator_cases()))
def test_fake_implementation_agrees_with_the_real_one(name, arranged):
    operator, arguments = operator_cases()[name]
    activations = 2 if name == "add_rms_norm" else 1
    arguments = (*map(arranged, arguments[:activations]), *arguments[activations:])
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
    assert [(r.shape, r.dtype, r.stride()) for r in real] == [(f.shape, f.dtype, f.stride()) for f in fake]


def bad_attention_arguments():
    p = problem([1, 2], 4, 2, 8, 10, torch.float32)
    names = ("qkv", "cos_sin", "lengths", "k_cache", "v_cache", "num_heads")
    good = dict(zip(names, p.arguments(), strict=True))
    yield {**good, "qkv": p.qkv.int()}, TypeError, "qkv must be float16"
    yield {**good, "qkv": p.qkv[:, :56]}, ValueError, "qkv must have 64 columns"
    yield {**good, "qkv": None}, TypeError, "qkv must be a tensor"
    yield {**good, "num_heads": 3}, ValueError, "num_heads must be a positive multiple"
    yield {**good, "cos_sin": p.cos_sin.half()}, TypeError, "cos_sin must be float32"
    yield {**good, "cos_sin": p.cos_sin[:9]}, ValueError, "cos_sin must have shape"
    yield {**good, "k_cache": p.k_cache.half()}, TypeError, "k_cache must be float32"
    yield {**good, "k_cache": p.k_cache[:, :, :8]}, ValueError, "k_cache must be contiguous"
    yield {**good, "v_cache": p.v_cache[:1]}, ValueError, "v_cache must have the shape"
    yield {**good, "v_cache": p.v_cache[:, :, :8]}, ValueError, "v_cache must be contiguous"
    yield {**good, "lengths": p.lengths[:1], "qkv": p.qkv[:1]}, ValueError, "k_cache must have a row for each of the 1"
    yield {**good, "num_heads": 0}, ValueError, "num_heads must be a positive multiple"
    yield {**good, "softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite"
    yield {**good, "k_cache": p.k_cache[0]}, ValueError, "k_cache must have 4 dim"
    yield {**good, "lengths": p.lengths.long()}, TypeError, "lengths must be int32"
    yield {**good, "lengths": p.lengths[:1]}, ValueError, r"lengths must have shape \[2\]"
    yield {**good, "lengths": p.lengths + 8}, ValueError, r"lengths must be in 0\.\.9"
    yield {**good, "lengths": p.lengths - 2}, ValueError, r"lengths must be in 0\.\.9"
    yield {**good, "softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"
    yield {**good, "window": 0}, ValueError, "window must be None or at least 1"


@pytest.mark.parametrize(("arguments", "error", "message"), list(bad_attention_arguments()))
def test_decode_attention_refuses_bad_arguments(arguments, error, message):
    for function in (fastgemm.decode_attention, fastgemm.decode_attention_quant):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_rope_append_refuses_indices_outside_the_cache():
    p = problem([1, 2], 4, 2, 8, 10, torch.float32)
    good = torch.tensor([0, 1], dtype=torch.int32)
    for positions, rows, message in (
        (good + 9, good, r"positions must be in 0\.\.9"),
        (good, good - 1, r"rows must be in 0\.\.1"),
        (good[:1], good, r"positions must have shape \[2\]"),
        (good, good[:1], r"rows must have shape \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fastgemm.rope_append(p.qkv, p.cos_sin, positions, rows, p.k_cache, p.v_cache, 4)
