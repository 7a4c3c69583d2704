"""CPU implementations against int64 and float64 references, and the argument checks they share with CUDA."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgemm
from fastgemm import cpu, reference
from fastgemm.shapes import edge_cases, model_names, model_shapes, parse_shapes

OUT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def problem(m, n, k, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    w = torch.randint(low, -low, (n, k), dtype=torch.int8, generator=generator)
    x_scale = torch.rand(m, generator=generator) * 0.1
    w_scale = torch.rand(n, generator=generator) * 0.01
    return x, x_scale, w, w_scale


def run(bits, x, x_scale, w, w_scale, bias=None, out_dtype=torch.int32):
    if bits == 4:
        return fastgemm.w4a8_gemm(x, x_scale, fastgemm.pack(w), w_scale, bias, out_dtype)
    return fastgemm.w8a8_gemm(x, x_scale, w, w_scale, bias, out_dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), [c for c in edge_cases() if c[0] * c[1] * c[2] < 5e7])
def test_raw_accumulator_is_exact(bits, m, n, k):
    x, x_scale, w, w_scale = problem(m, n, k, bits)
    y = run(bits, x, x_scale, w, w_scale)
    assert y.dtype == torch.int32
    np.testing.assert_array_equal(y.numpy(), reference.accumulate(x.numpy(), w.numpy()))


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**31),
)
def test_raw_accumulator_is_exact_for_any_shape(m, n, k, bits, seed):
    x, x_scale, w, w_scale = problem(m, 16 * n, 32 * k, bits, seed)
    y = run(bits, x, x_scale, w, w_scale)
    np.testing.assert_array_equal(y.numpy(), reference.accumulate(x.numpy(), w.numpy()))


@pytest.mark.parametrize("k", [4096, fastgemm.MAX_K])
@pytest.mark.parametrize(("bits", "lowest"), [(4, -8), (8, -128)])
def test_extreme_values_do_not_overflow(bits, lowest, k):
    x = torch.full((2, k), -128, dtype=torch.int8)
    x[1] = 127
    w = torch.full((16, k), lowest, dtype=torch.int8)
    y = run(bits, x, torch.ones(2), w, torch.ones(16))
    assert y[0].tolist() == [128 * -lowest * k] * 16
    assert y[1].tolist() == [127 * lowest * k] * 16


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_scaled_output_matches_the_epilogue_to_the_bit(bits, out_dtype, with_bias, rng):
    x, x_scale, w, w_scale = problem(9, 48, 256, bits)
    bias = torch.randn(48, generator=rng).to(out_dtype) if with_bias else None
    y = run(bits, x, x_scale, w, w_scale, bias, out_dtype)
    acc = reference.accumulate(x.numpy(), w.numpy())
    bias32 = None if bias is None else bias.float().numpy()
    expected = reference.scale_output(acc, x_scale.numpy(), w_scale.numpy(), bias32)
    assert y.dtype == out_dtype
    assert torch.equal(y, torch.from_numpy(expected).to(out_dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_strided_activations_are_accepted(bits):
    x, x_scale, w, w_scale = problem(6, 32, 128, bits)
    wide = torch.zeros(6, 256, dtype=torch.int8)
    wide[:, 64:192] = x
    expected = run(bits, x, x_scale, w, w_scale)
    assert torch.equal(run(bits, wide[:, 64:192], x_scale, w, w_scale), expected)
    assert torch.equal(run(bits, x.t().contiguous().t(), x_scale, w, w_scale), expected)
    for offset in (1, 2, 3):
        inside = torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)
        assert torch.equal(run(bits, inside, x_scale, w, w_scale), expected)


@pytest.mark.parametrize("refusal", ["small_m", "everything", "wrong"])
def test_products_stay_exact_where_int_mm_cannot_be_used(monkeypatch, refusal):
    original = torch._int_mm

    def int_mm(a, b):
        if refusal == "everything" or (refusal == "small_m" and a.shape[0] <= 16):
            raise RuntimeError("_int_mm: refused")
        return original(a, b).clamp(-(2**15), 2**15 - 1) if refusal == "wrong" else original(a, b)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    cpu._int_mm_min_rows.cache_clear()
    try:
        if refusal != "small_m":
            assert cpu._int_mm_min_rows() is None
        for m, k, bits in ((1, 512, 8), (5, 2080, 8), (40, 1024, 8), (3, 1056, 4)):
            x, x_scale, w, w_scale = problem(m, 64, k, bits)
            x[0], w[:16] = -127, w[:16].abs().bitwise_or_(2 ** (bits - 2)).clamp_(max=2 ** (bits - 1) - 1)  # large sums
            w[16] = -(2 ** (bits - 1))
            y = run(bits, x, x_scale, w, w_scale)
            np.testing.assert_array_equal(y.numpy(), reference.accumulate(x.numpy(), w.numpy()))
    finally:
        cpu._int_mm_min_rows.cache_clear()


@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize("k", [1, 7, 64, 1000, 4096])
def test_quantize_per_token_is_bit_exact(dtype, k, rng):
    x = (torch.randn(13, k, generator=rng) * torch.logspace(-6, 4, 13)[:, None]).to(dtype)
    x[3] = 0
    x[5] = torch.arange(k) - k / 2  # many exact ties
    q, scale = fastgemm.quantize_per_token(x)
    expected_q, expected_scale = reference.quantize_per_token(x.float().numpy())
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    assert scale[3] == 1
    assert not q[3].any()


def test_quotients_above_127_are_saturated():
    """A subnormal scale has so few digits that x / scale leaves int8 on both sides."""
    x = torch.tensor([[-190.0, 190.0, 64.0, -3.0]]) * 2**-149
    q, scale = fastgemm.quantize_per_token(x)
    assert scale.item() == 2**-149
    assert q.tolist() == [[-128, 127, 64, -3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_rows_are_not_hidden(bad):
    x = torch.randn(3, 64)
    x[1, 5] = bad
    q, scale = fastgemm.quantize_per_token(x)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert not q[1].any()
    y = fastgemm.w8a8_gemm(q, scale, torch.ones(16, 64, dtype=torch.int8), torch.ones(16))
    assert torch.isfinite(y).all(dim=1).tolist() == [True, False, True]
    gate_up = torch.cat([x, x], dim=1)
    assert torch.isfinite(fastgemm.silu_mul_quant(gate_up)[1]).tolist() == [True, False, True]
    scale = fastgemm.rms_norm_quant(x, torch.ones(64), 1e-6)[1]
    assert torch.isfinite(scale).tolist() == [True, False, True]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", OUT_DTYPES)
def test_rms_norm_quant_equals_the_unfused_modules(dtype, with_residual, rng):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(7, 512, generator=rng).to(dtype)
    residual = torch.randn(7, 512, generator=rng).to(dtype) if with_residual else None
    norm = LlamaRMSNorm(512, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(512, generator=rng).to(dtype)
    h = x if residual is None else residual + x
    q, scale, h_out = fastgemm.rms_norm_quant(x, norm.weight.data, 1e-5, residual)
    expected_q, expected_scale = fastgemm.quantize_per_token(norm(h).detach())
    assert torch.equal(h_out, h)
    assert (h_out is x) == (residual is None)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", OUT_DTYPES)
def test_silu_mul_quant_equals_the_unfused_sequence(dtype, rng):
    gate_up = (torch.randn(7, 1024, generator=rng) * 3).to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    q, scale = fastgemm.silu_mul_quant(gate_up)
    expected_q, expected_scale = fastgemm.quantize_per_token(F.silu(gate) * up)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


def test_fused_steps_are_near_float64(rng):
    x, weight = torch.randn(5, 256, generator=rng), torch.randn(256, generator=rng)
    for (q, scale), expected in (
        (fastgemm.rms_norm_quant(x, weight, 1e-6)[:2], reference.rms_norm(x.numpy(), weight.numpy(), 1e-6)),
        (fastgemm.silu_mul_quant(x), reference.silu_mul(x.numpy())),
    ):
        error = np.abs(q.numpy() * scale.numpy()[:, None].astype(np.float64) - expected)
        assert (error <= scale.numpy()[:, None] * 0.5001).all()


def test_zero_tokens():
    assert fastgemm.quantize_per_token(torch.empty(0, 64))[0].shape == (0, 64)
    assert fastgemm.silu_mul_quant(torch.empty(0, 64))[0].shape == (0, 32)
    q, scale, h = fastgemm.rms_norm_quant(torch.empty(0, 64), torch.ones(64), 1e-6, torch.empty(0, 64))
    assert (q.shape, scale.shape, h.shape) == ((0, 64), (0,), (0, 64))


def bad_gemm_arguments():
    x, x_scale, w, w_scale = problem(4, 80, 160, 4)
    good = {"x": x, "x_scale": x_scale, "w": w, "w_scale": w_scale, "bias": None, "out_dtype": torch.float16}
    yield {**good, "x": x.float()}, TypeError, "x must be int8"
    yield {**good, "x": x.numpy()}, TypeError, "x must be a tensor"
    yield {**good, "x": x[0]}, ValueError, "x must have 2 dim"
    yield {**good, "x": x[:, :48]}, ValueError, "K .* multiple of 32"
    yield {**good, "x": x[:, :32].contiguous()}, ValueError, r"w.* must have shape"
    yield {**good, "x": x.to("meta")}, ValueError, "is on cpu but the first argument is on meta"
    yield {**good, "x_scale": x_scale.double()}, TypeError, "x_scale must be float32"
    yield {**good, "x_scale": x_scale[:3]}, ValueError, r"x_scale must have shape \[4\]"
    yield {**good, "x_scale": x_scale[:, None]}, ValueError, "x_scale must have 1 dim"
    yield {**good, "w_scale": w_scale.half()}, TypeError, "w_scale must be float32"
    yield {**good, "w_scale": w_scale[:20]}, ValueError, "N .* multiple of 16"
    yield {**good, "w_scale": w_scale[:0]}, ValueError, "N .* positive"
    yield {**good, "w_scale": w_scale[:16]}, ValueError, r"w.* must have shape"
    yield {**good, "bias": torch.zeros(80)}, TypeError, "bias must be float16"
    yield {**good, "bias": torch.zeros(79, dtype=torch.float16)}, ValueError, r"bias must have shape \[80\]"
    yield (
        {**good, "bias": torch.zeros(80, dtype=torch.int32), "out_dtype": torch.int32},
        ValueError,
        "bias must be None",
    )
    yield {**good, "bias": [0.0] * 80}, TypeError, "bias must be a tensor, got list"
    yield {**good, "bias": torch.zeros(80).half().to_sparse()}, TypeError, "bias must be a dense tensor"
    yield {**good, "out_dtype": "float16"}, TypeError, "out_dtype must be a torch.dtype, got 'float16'"
    yield {**good, "out_dtype": torch.float64}, TypeError, "out_dtype must be"
    yield {**good, "arch": 75}, ValueError, "arch must be one of"
    yield {**good, "x": x.to_sparse()}, TypeError, "x must be a dense tensor"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("arguments", "error", "message"), list(bad_gemm_arguments()))
def test_gemm_refuses_bad_arguments(bits, arguments, error, message):
    arguments = dict(arguments)
    w = arguments.pop("w")
    if bits == 8:
        function, arguments["w"] = fastgemm.w8a8_gemm, w
    else:
        function, arguments["w_packed"] = fastgemm.w4a8_gemm, fastgemm.pack(w)
    with pytest.raises(error, match=message):
        function(**arguments)


def test_gemm_refuses_bad_weights():
    x, x_scale, w, w_scale = problem(4, 128, 64, 4)
    packed = fastgemm.pack(w)
    with pytest.raises(TypeError, match="w_packed must be uint8"):
        fastgemm.w4a8_gemm(x, x_scale, packed.view(torch.int8), w_scale)
    with pytest.raises(ValueError, match=r"w_packed must have shape \[2, 1, 2048\]"):
        fastgemm.w4a8_gemm(x, x_scale, packed[:1], w_scale)
    with pytest.raises(ValueError, match="w_packed must be contiguous"):
        fastgemm.w4a8_gemm(x, x_scale, packed.flip(2).transpose(0, 2).contiguous().transpose(0, 2), w_scale)
    with pytest.raises(ValueError, match="w must be contiguous"):
        fastgemm.w8a8_gemm(x, x_scale, w.t().contiguous().t(), w_scale)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fastgemm.quantize_per_token(torch.zeros(2, 8, dtype=torch.int32)),
            TypeError,
            "x must be float16",
        ),
        (lambda: fastgemm.quantize_per_token(torch.zeros(8)), ValueError, "x must have 2 dim"),
        (lambda: fastgemm.quantize_per_token(torch.zeros(2, 0)), ValueError, "at least one column"),
        (lambda: fastgemm.quantize_per_token([1.0]), TypeError, "x must be a tensor"),
        (
            lambda: fastgemm.silu_mul_quant(torch.zeros(2, 7)),
            ValueError,
            r"gate_up must have shape \[M, 2 \* I\]",
        ),
        (lambda: fastgemm.silu_mul_quant(torch.zeros(2, 0)), ValueError, "at least one column"),
        (
            lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(7), 1e-6),
            ValueError,
            r"weight .* \[8\]",
        ),
        (
            lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(8).half(), 1e-6),
            TypeError,
            "weight must be",
        ),
        (lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(8), -1.0), ValueError, "eps must be"),
        (lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(8), float("nan")), ValueError, "eps must be"),
        (lambda: fastgemm.rms_norm_quant(torch.zeros(2, 0), torch.ones(0), 1e-6), ValueError, "at least one column"),
        (
            lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(8), 1e-6, torch.zeros(3, 8)),
            ValueError,
            "residual must have the shape of x",
        ),
        (
            lambda: fastgemm.rms_norm_quant(torch.zeros(2, 8), torch.ones(8), 1e-6, torch.zeros(2, 8).half()),
            TypeError,
            "residual must be float32",
        ),
    ],
)
def test_elementwise_refuses_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", model_names())
def test_shapes_are_those_of_the_models_configuration(name):
    from odyssey.engine.shapes import known_config

    config = known_config(name)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.hidden_size // heads
    assert {shape.layer: (shape.n, shape.k) for shape in model_shapes(name)} == {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }


def test_shapes_of_every_model_are_valid():
    for name in model_names():
        assert len(parse_shapes(name)) == len({(s.n, s.k) for s in model_shapes(name)})
    assert [(s.n, s.k) for s in parse_shapes("llama2-70b,4096x4096, 57344x8192")] == [
        (10240, 8192),
        (8192, 8192),
        (57344, 8192),
        (8192, 28672),
        (4096, 4096),
    ]
    for bad, message in (("llama-8t", "unknown model"), ("15x32", "multiple of 16"), ("", "no shapes")):
        with pytest.raises(ValueError, match=message):
            parse_shapes(bad)
