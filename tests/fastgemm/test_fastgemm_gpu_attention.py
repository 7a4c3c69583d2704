"""The CUDA kernels of the decoder layer against float64, the CPU implementations and each other."""

import pytest
import torch
from fastgemm_attention_cases import UNIT, assert_rounded, attend, problem

import fastgemm
from fastgemm import decoder_cuda
from fastgemm.library import load

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
# Groups of 1, 3, 4, 8 and 20 query heads; 20 take three blocks of up to eight.
HEADS = [(4, 4, 128), (6, 2, 64), (16, 4, 128), (16, 2, 64), (20, 1, 128), (5, 5, 64)]
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 200, 777, 1023, 1149]
MAX_LEN = 1150
# Probabilities are rounded to the model's dtype: about one unit of the row's size.
SLACK = 2.0


def poison_allocator(numbers=2**22):
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((numbers >> i,), torch.nan, device="cuda") for i in range(16)]
    del blocks


def bits(t):
    return t.view(torch.int16)


def split(p, splits, window=None, quantized=False):
    """The operator with a given number of splits, on caches of its own."""
    return decoder_cuda._decode_attention(*p.arguments(), None, window, quantized, splits)


@pytest.mark.parametrize("window", [None, 1, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention_equals_float64_and_appends_as_the_cpu(dtype, num_heads, kv_heads, head_dim, window):
    p = problem(LENGTHS, num_heads, kv_heads, head_dim, MAX_LEN, dtype, "cuda")
    arguments = p.arguments()
    poison_allocator()
    out = fastgemm.decode_attention(*arguments, window=window)
    assert_rounded(out, attend(p, window=window), dtype, slack=SLACK * UNIT[dtype])
    q, scale = fastgemm.decode_attention_quant(*p.arguments(), window=window)
    expected_q, expected_scale = fastgemm.quantize_per_token(out)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in p.arguments()]
    fastgemm.decode_attention(*on_cpu)
    for cache, expected in zip(arguments[3:5], on_cpu[3:5], strict=True):
        assert torch.equal(bits(cache).cpu(), bits(expected))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 17, 33, 64])
def test_any_number_of_splits(splits, window):
    p = problem(LENGTHS, 8, 2, 128, MAX_LEN, torch.float16, "cuda")
    poison_allocator()
    out = split(p, splits, window)
    assert_rounded(out, attend(p, window=window), torch.float16, slack=SLACK * UNIT[torch.float16])
    assert torch.equal(out, split(p, splits, window))
    for got, want in zip(split(p, splits, window, True), fastgemm.quantize_per_token(out), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim"), [(1, 1, 64), (64, 8, 128), (128, 8, 128), (160, 4, 128)]
)
def test_narrow_and_wide_rows_quantize_the_same(num_heads, kv_heads, head_dim):
    p = problem([5, 100], num_heads, kv_heads, head_dim, 128, torch.bfloat16, "cuda")
    out = fastgemm.decode_attention(*p.arguments())
    assert_rounded(out, attend(p), torch.bfloat16, slack=SLACK * UNIT[torch.bfloat16])
    for got, want in zip(
        fastgemm.decode_attention_quant(*p.arguments()), fastgemm.quantize_per_token(out), strict=True
    ):
        assert torch.equal(got, want)


def test_large_scores_and_a_given_scale():
    p = problem([300, 64], 4, 4, 128, 512, torch.float16, "cuda")
    p.qkv *= 30
    out = fastgemm.decode_attention(*p.arguments(), softmax_scale=0.5)
    # Scores of hundreds: a query rounded to the other side of a tie moves a weight by a hundredth.
    assert_rounded(out, attend(p, softmax_scale=0.5), torch.float16, slack=2**-6)
    assert torch.isfinite(out).all()


def test_not_finite_values_are_not_hidden():
    p = problem([30, 30, 30], 4, 4, 64, 32, torch.float16, "cuda")
    p.v_cache[1, 2, 7, 5] = torch.nan
    p.k_cache[2, 0, 3, 0] = torch.nan
    out = fastgemm.decode_attention(*p.arguments())
    assert out.isfinite().all(dim=1).tolist() == [True, False, False]
    assert fastgemm.decode_attention_quant(*p.arguments())[1].isfinite().tolist() == [True, False, False]


def test_a_length_outside_the_cache_gives_nan_and_writes_nothing():
    p = problem([3, 10, 3, 5], 4, 2, 64, 10, torch.float16, "cuda")
    p.lengths[2] = -1
    arguments = p.arguments()
    out = fastgemm.decode_attention(*arguments)
    assert out.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert not out[[0, 3]].isnan().any()
    for cache, before in zip(arguments[3:5], (p.k_cache, p.v_cache), strict=True):
        assert torch.equal(bits(cache)[1:3], bits(before)[1:3])
    assert fastgemm.decode_attention_quant(*p.arguments())[1].isfinite().tolist() == [True, False, False, True]


def test_no_sequences():
    p = problem([], 4, 2, 64, 16, torch.float16, "cuda")
    assert fastgemm.decode_attention(*p.arguments()).shape == (0, 256)
    assert fastgemm.decode_attention_quant(*p.arguments())[0].shape == (0, 256)


def test_what_the_kernels_cannot_do_is_refused():
    p = problem([3], 4, 2, 64, 16, torch.float32, "cuda")
    with pytest.raises(TypeError, match="qkv must be float16 or bfloat16 on a GPU"):
        fastgemm.decode_attention(*p.arguments())
    p = problem([3], 4, 2, 32, 16, torch.float16, "cuda")
    with pytest.raises(ValueError, match=r"head_dim of \(64, 128\)"):
        fastgemm.decode_attention(*p.arguments())
    p = problem([3], 4, 2, 64, 16, torch.float16, "cuda")
    shifted = torch.zeros(p.k_cache.numel() + 1, dtype=torch.float16, device="cuda")[1:].view(p.k_cache.shape)
    with pytest.raises(ValueError, match="k_cache must be 16-byte aligned"):
        fastgemm.decode_attention(p.qkv, p.cos_sin, p.lengths, shifted, p.v_cache, 4)
    with pytest.raises(fastgemm.FastGemmError, match="sizes out of range"):
        split(p, 65)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), HEADS)
def test_rope_append_equals_the_cpu_to_the_bit(dtype, num_heads, kv_heads, head_dim):
    p = problem([0, 0, 0], num_heads, kv_heads, head_dim, 500, dtype)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(1500, generator=generator)[:1001]
    positions, rows = (order % 500).int(), (order // 500).int()
    qkv = torch.randn(1001, p.qkv.shape[1], generator=generator).to(dtype)
    arguments = [qkv, p.cos_sin, positions, rows, p.k_cache, p.v_cache]
    on_gpu = [a.cuda() for a in arguments]
    poison_allocator()
    q = fastgemm.rope_append(*on_gpu, num_heads)
    assert torch.equal(bits(q).cpu(), bits(fastgemm.rope_append(*arguments, num_heads)))
    for cache, expected in zip(on_gpu[4:], arguments[4:], strict=True):
        assert torch.equal(bits(cache).cpu(), bits(expected))


def test_rope_append_outside_the_cache_gives_nan_and_writes_nothing():
    p = problem([0, 0], 4, 2, 128, 8, torch.float16, "cuda")
    positions = torch.tensor([8, -1, 2, 2, 3], dtype=torch.int32, device="cuda")
    rows = torch.tensor([0, 0, 2, -1, 1], dtype=torch.int32, device="cuda")
    qkv = torch.randn(5, p.qkv.shape[1], device="cuda", dtype=torch.float16)
    q = fastgemm.rope_append(qkv, p.cos_sin, positions, rows, p.k_cache, p.v_cache, 4)
    assert q.isnan().flatten(1).all(dim=1).tolist() == [True, True, True, True, False]
    assert not q[4].isnan().any()
    written = ~p.v_cache.isnan().any(dim=3)
    assert written.nonzero().tolist() == [[1, 0, 3], [1, 1, 3]]


def decode_steps(p, steps, between=lambda: None, cache_ready=False):
    """`steps` tokens with each output fed back into the next qkv; caches and lengths of p advance."""
    outputs = []
    qkv, lengths = p.qkv.clone(), p.lengths.clone()
    for _ in range(steps):
        out = fastgemm.decode_attention(
            qkv, p.cos_sin, lengths, p.k_cache, p.v_cache, p.num_heads, cache_ready=cache_ready
        )
        between()
        q, scale = fastgemm.quantize_per_token(out)
        between()
        h, _ = fastgemm.rms_norm(out, torch.ones_like(out[0]), 1e-5, (q * scale[:, None]).to(out.dtype))
        between()
        qkv = torch.cat((h, h, fastgemm.silu_mul(torch.cat((h, h), 1))), dim=1)
        between()
        lengths = lengths + 1
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("cache_ready", [False, True])
def test_overlapped_launches_and_graphs_equal_one_kernel_at_a_time(cache_ready):
    def fresh():
        return problem([0, 100, 31, 900], 8, 8, 128, 1000, torch.float16, "cuda")

    expected = decode_steps(fresh(), 20, torch.cuda.synchronize)
    assert torch.isfinite(expected).all()
    for _ in range(3):
        assert torch.equal(decode_steps(fresh(), 20, cache_ready=cache_ready), expected)
    p = fresh()
    caches = p.k_cache.clone(), p.v_cache.clone()
    decode_steps(p, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_steps(p, 20, cache_ready=cache_ready)
    for _ in range(5):
        p.k_cache.copy_(caches[0])
        p.v_cache.copy_(caches[1])
        graph.replay()
        assert torch.equal(out, expected)


def test_behind_products_that_let_it_start_early():
    """A layer's QKV product and attention in turns, the cache of a layer read again after two kernels of another."""
    p = problem([900, 5], 8, 8, 128, 1000, torch.float16, "cuda")
    width, layers, steps = 1024, 2, 12
    weights = [torch.randint(-8, 8, (3 * width, width), dtype=torch.int8, device="cuda") for _ in range(layers)]
    packed, scales = [fastgemm.pack(w) for w in weights], torch.full((3 * width,), 2e-3, device="cuda")
    q, x_scale = fastgemm.quantize_per_token(torch.randn(2, width, device="cuda").half())

    def chain(cache_ready):
        caches = [(p.k_cache.clone(), p.v_cache.clone()) for _ in range(layers)]
        lengths, x, outputs = p.lengths.clone(), (q, x_scale), []
        torch.cuda.synchronize()
        for _ in range(steps):
            for layer in range(layers):
                qkv = fastgemm.w4a8_gemm(*x, packed[layer], scales, weights_ready=True)
                if not cache_ready:
                    torch.cuda.synchronize()
                x = fastgemm.decode_attention_quant(
                    qkv, p.cos_sin, lengths, *caches[layer], p.num_heads, cache_ready=cache_ready
                )
                outputs.append(x[0])
            lengths = lengths + 1
        return torch.stack(outputs)

    expected = chain(False)
    for _ in range(20):
        assert torch.equal(chain(True), expected)


def test_a_graph_follows_the_lengths_on_the_device():
    p = problem([2, 700], 8, 2, 128, 1000, torch.float16, "cuda")
    for cache in (p.k_cache, p.v_cache):
        cache.copy_(torch.randn_like(cache))
    fastgemm.decode_attention_quant(*p.arguments())
    graph = torch.cuda.CUDAGraph()
    k_cache, v_cache = p.k_cache.clone(), p.v_cache.clone()
    with torch.cuda.graph(graph):
        q, scale = fastgemm.decode_attention_quant(p.qkv, p.cos_sin, p.lengths, k_cache, v_cache, 8)
    for lengths in ([0, 999], [640, 1], [17, 16]):
        p.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        k_cache.copy_(p.k_cache)
        v_cache.copy_(p.v_cache)
        graph.replay()
        error = (q * scale[:, None] - attend(p)).abs()
        assert (error <= scale[:, None] * 0.51 + 1e-3 * attend(p).abs().amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("cache_ready", [False, True])
def test_lengths_written_by_the_kernel_just_before(cache_ready):
    """That kernel lets attention start early, which then reads the length before it is written, and again after."""
    p = problem([900, 1, 37, 512], 8, 8, 128, 1000, torch.float16, "cuda")
    expected = fastgemm.decode_attention(*p.arguments())
    caches = p.k_cache.clone(), p.v_cache.clone()
    lengths = torch.zeros_like(p.lengths)
    # The scale of a row whose largest magnitude is 127 n units of the smallest subnormal has the bits of the integer n.
    x = (p.lengths * 127).view(torch.float32)[:, None].expand(-1, 1024).contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device="cuda")

    def launch():
        stream = torch.cuda.current_stream().cuda_stream
        load().quantize_per_token(x.data_ptr(), 3, q.data_ptr(), lengths.data_ptr(), *x.shape, stream)
        return fastgemm.decode_attention(p.qkv, p.cos_sin, lengths, *caches, p.num_heads, cache_ready=cache_ready)

    assert torch.equal(launch(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    for stale in (0, 3, 999, -1, 2**30):
        lengths.fill_(stale)
        graph.replay()
        assert torch.equal(lengths, p.lengths)
        assert torch.equal(out, expected)


def test_two_streams_at_once():
    problems = [problem([900 - 7 * i, 33 * i], 8, 8, 128, 1000, torch.float16, "cuda", seed=i) for i in range(2)]
    expected = [fastgemm.decode_attention(*p.arguments()) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    arguments = [p.arguments() for p in problems]
    torch.cuda.synchronize()
    outputs = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(fastgemm.decode_attention(*arguments[i]))
    torch.cuda.synchronize()
    for got, want in zip(outputs, expected, strict=True):
        assert all(torch.equal(g, want) for g in got)
