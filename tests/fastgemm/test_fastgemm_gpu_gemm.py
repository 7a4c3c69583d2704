"""The CUDA products against exact float64 sums, on every kernel path the GPU has."""

import numpy as np
import pytest
import torch

import fastgemm
from fastgemm import reference
from fastgemm.library import load
from fastgemm.shapes import edge_cases, model_shapes, shared_operand_cases

pytestmark = pytest.mark.gpu

OUT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GUARD_BYTES = 4096


@pytest.fixture(params=[80, 90])
def arch(request):
    if request.param == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wgmma kernels need a GPU of compute capability 9.0")
    return request.param


class Problem:
    """Random operands of one product on the GPU; the weight in int8 and, for 4 bits, packed."""

    def __init__(self, m, n, k, bits, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        low = -(2 ** (bits - 1))
        options = {"dtype": torch.int8, "device": "cuda", "generator": generator}
        self.bits, self.m, self.n, self.k = bits, m, n, k
        self.x = torch.randint(-128, 128, (m, k), **options)
        self.w = torch.randint(low, -low, (n, k), **options)
        self.x_scale = torch.rand(m, device="cuda", generator=generator) * 0.1
        self.w_scale = torch.rand(n, device="cuda", generator=generator) * 0.01
        self.prepare()

    def prepare(self):
        self.stored = fastgemm.pack(self.w) if self.bits == 4 else self.w
        return self

    def accumulate(self):
        # float64 holds every partial sum below 2^53 exactly.
        return (self.x.double() @ self.w.double().t()).to(torch.int64)

    def run(self, arch, bias=None, out_dtype=torch.int32):
        function = fastgemm.w4a8_gemm if self.bits == 4 else fastgemm.w8a8_gemm
        return function(self.x, self.x_scale, self.stored, self.w_scale, bias, out_dtype, arch=arch)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), edge_cases() + shared_operand_cases())
def test_raw_accumulator_is_exact(arch, bits, m, n, k):
    p = Problem(m, n, k, bits, seed=m + n + k)
    y = p.run(arch)
    assert y.shape == (m, n)
    assert torch.equal(y.long(), p.accumulate())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 50, 129])
@pytest.mark.parametrize("model", ["qwen2.5-7b", "llama3-8b"])
def test_model_layers_are_exact(arch, bits, m, model):
    for shape in model_shapes(model):
        p = Problem(m, shape.n, shape.k, bits)
        assert torch.equal(p.run(arch).long(), p.accumulate()), shape


@pytest.mark.parametrize("m", [1, 40, 130])
@pytest.mark.parametrize("k", [65536, fastgemm.MAX_K])
@pytest.mark.parametrize(("bits", "lowest"), [(4, -8), (8, -128)])
def test_extreme_values_do_not_overflow(arch, bits, lowest, k, m):
    p = Problem(m, 80, k, bits)
    p.x.fill_(-128)
    p.w.fill_(lowest)
    p.x[-1] = 127
    y = p.prepare().run(arch)
    assert torch.equal(y.long(), p.accumulate())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 96, 4096), (37, 208, 544), (300, 272, 1024), (385, 8208, 2048), (200, 17040, 544)]
)
def test_scaled_output_matches_the_epilogue_to_the_bit(arch, bits, out_dtype, with_bias, m, n, k):
    p = Problem(m, n, k, bits)
    bias = torch.randn(n, device="cuda").to(out_dtype) if with_bias else None
    y = p.run(arch, bias, out_dtype)
    expected = reference.scale_output(
        p.accumulate().cpu().numpy(),
        p.x_scale.cpu().numpy(),
        p.w_scale.cpu().numpy(),
        None if bias is None else bias.float().cpu().numpy(),
    )
    assert y.dtype == out_dtype
    assert torch.equal(y.cpu(), torch.from_numpy(expected).to(out_dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.int32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (3, 4112, 512), (33, 80, 96), (129, 336, 224)])
def test_writes_all_of_the_output_and_nothing_else(arch, bits, out_dtype, m, n, k):
    p = Problem(m, n, k, bits)
    code = {torch.float16: 0, torch.int32: 2}[out_dtype]
    library = load()
    size = m * n * out_dtype.itemsize
    images = []
    for poison in (0x5A, 0xA5):
        buffer = torch.full((size + 2 * GUARD_BYTES,), poison, dtype=torch.uint8, device="cuda")
        workspace_bytes = library.gemm_workspace_bytes(int(bits == 8), m, n, k, arch)
        workspace = torch.full((workspace_bytes + 16,), poison, dtype=torch.uint8, device="cuda")
        function = library.w4a8_gemm if bits == 4 else library.w8a8_gemm
        function(
            p.x.data_ptr(),
            p.x_scale.data_ptr(),
            p.stored.data_ptr(),
            p.w_scale.data_ptr(),
            0,
            buffer.data_ptr() + GUARD_BYTES,
            m,
            n,
            k,
            code,
            workspace.data_ptr(),
            workspace_bytes,
            arch,
            torch.cuda.current_stream().cuda_stream,
        )
        image = buffer.cpu()
        assert (image[:GUARD_BYTES] == poison).all()
        assert (image[GUARD_BYTES + size :] == poison).all()
        assert (workspace[workspace_bytes:] == poison).all()
        images.append(image[GUARD_BYTES : GUARD_BYTES + size])
    assert torch.equal(*images)
    assert torch.equal(images[0].view(out_dtype).view(m, n), p.run(arch, None, out_dtype).cpu())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1024, 2048), (64, 1024, 2048), (500, 1024, 2048), (385, 8208, 2048), (200, 17040, 544)]
)
def test_results_repeat_to_the_bit_on_two_streams_at_once(arch, bits, m, n, k):
    problems = [Problem(m, n, k, bits, seed) for seed in (0, 1)]
    expected = [p.run(arch, None, torch.float16) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(30):
        for p, stream, found in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(p.run(arch, None, torch.float16))
    torch.cuda.synchronize()
    for found, y in zip(results, expected, strict=True):
        assert all(torch.equal(f, y) for f in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 200])
def test_runs_on_the_device_of_its_arguments(bits, m):
    p = Problem(m, 4096, 2048, bits)
    expected = p.run(0, None, torch.float16)
    for name in ("x", "x_scale", "stored", "w_scale"):
        setattr(p, name, getattr(p, name).to("cuda:1"))
    assert torch.cuda.current_device() == 0
    y = p.run(0, None, torch.float16)
    assert y.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), expected.cpu())
    q = fastgemm.quantize_per_token(y)[0]
    assert q.device.index == 1
    assert torch.equal(q.cpu(), fastgemm.quantize_per_token(y.cpu())[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 200])
def test_cuda_graph_replays_on_new_inputs(arch, bits, m):
    p = Problem(m, 512, 1024, bits)
    p.run(arch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.run(arch)
    for seed in (5, 6):
        p.x.copy_(Problem(m, 512, 1024, bits, seed).x)
        y.fill_(-1)
        graph.replay()
        assert torch.equal(y.long(), p.accumulate())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 40, 96, 192, 300])
def test_weights_ready_changes_nothing_in_a_chain_of_dependent_kernels(bits, m):
    # Square, odd in 256 columns, wider than one wave of tiles; every product reads what the kernel before it wrote.
    sizes = [(4096, 4096), (1152, 4096), (17024, 1152), (4096, 17024)]
    problems = [Problem(m, n, k, bits, seed) for seed, (n, k) in enumerate(sizes)]

    def chain(h, ready):
        for p in problems:
            q, scale = fastgemm.quantize_per_token(h)
            function = fastgemm.w4a8_gemm if bits == 4 else fastgemm.w8a8_gemm
            h = function(q, scale, p.stored, p.w_scale, None, torch.float32, weights_ready=ready)
        return h

    h = torch.randn(m, 4096, device="cuda")
    chain(h, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(h, True)
    for _ in range(5):
        h.normal_()
        torch.cuda.synchronize()
        expected = chain(h, False)
        torch.cuda.synchronize()
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(chain(h, True), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_misaligned_and_strided_arguments(arch, bits):
    p = Problem(9, 96, 256, bits)
    expected = p.run(arch, None, torch.float32)
    wide = torch.zeros(9, 301, dtype=torch.int8, device="cuda")
    wide[:, 13:269] = p.x
    p.x = wide[:, 13:269]
    p.x_scale = torch.cat([p.x_scale.new_zeros(1), p.x_scale])[1:]
    p.w_scale = torch.cat([p.w_scale.new_zeros(3), p.w_scale])[3:]
    assert torch.equal(p.run(arch, None, torch.float32), expected)
    shape = p.stored.shape
    p.stored = torch.cat([p.stored.new_zeros(1), p.stored.flatten()])[1:].view(shape)
    with pytest.raises(ValueError, match="must be 16-byte aligned"):
        p.run(arch)


def test_more_tokens_than_one_launch_takes():
    p = Problem(65536 + 77, 16, 32, 4)
    assert torch.equal(p.run(0).long(), p.accumulate())


def test_default_path_equals_cpu():
    for bits in (4, 8):
        p = Problem(7, 112, 320, bits)
        y = p.run(0, None, torch.float16)
        function = fastgemm.w4a8_gemm if bits == 4 else fastgemm.w8a8_gemm
        on_cpu = function(*(t.cpu() for t in (p.x, p.x_scale, p.stored, p.w_scale)))
        assert torch.equal(y.cpu(), on_cpu)


def test_pack_on_the_gpu_equals_pack_on_the_cpu():
    w = torch.randint(-8, 8, (208, 352), dtype=torch.int8, device="cuda")
    packed = fastgemm.pack(w)
    assert torch.equal(packed.cpu(), fastgemm.pack(w.cpu()))
    assert torch.equal(fastgemm.unpack(packed, 208, 352), w)


def test_arguments_on_another_device_are_refused():
    p = Problem(4, 16, 32, 8)
    with pytest.raises(ValueError, match="w is on cpu but the first argument is on cuda"):
        fastgemm.w8a8_gemm(p.x, p.x_scale, p.w.cpu(), p.w_scale)


def test_c_interface_reports_errors():
    library = load()
    p = Problem(4, 16, 32, 8)
    y = torch.empty(4, 16, dtype=torch.float16, device="cuda")
    good = [p.x, p.x_scale, p.w, p.w_scale]
    pointers = [t.data_ptr() for t in good] + [0, y.data_ptr()]
    stream = torch.cuda.current_stream().cuda_stream
    for tail, message in (
        ((4, 24, 32, 0, 0, 0, 0, stream), "sizes out of range"),
        ((4, 16, 32, 9, 0, 0, 0, stream), "data type"),
        ((4, 16, 32, 0, 0, 0, 70, stream), "not available on this device"),
    ):
        with pytest.raises(fastgemm.FastGemmError, match=message):
            library.w8a8_gemm(*pointers, *tail)
    with pytest.raises(fastgemm.FastGemmError, match="NULL"):
        library.w8a8_gemm(0, *pointers[1:], 4, 16, 32, 0, 0, 0, 0, stream)


def test_compiled_and_captured_layer_equals_eager():
    p = Problem(16, 256, 512, 4)
    norm = torch.rand(512, device="cuda", dtype=torch.float16)

    def layer(h):
        q, scale, _ = fastgemm.rms_norm_quant(h * 2, norm, 1e-6)
        return fastgemm.w4a8_gemm(q, scale, p.stored, p.w_scale) + 1

    h = torch.randn(16, 512, device="cuda", dtype=torch.float16)
    expected = layer(h)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):
            got = compiled(h).clone()
        np.testing.assert_array_equal(got.cpu().numpy(), expected.cpu().numpy())
