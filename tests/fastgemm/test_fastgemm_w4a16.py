"""W4A16 products against float64, on the CPU and through every backend a GPU has."""

import pytest
import torch

from fastgemm import w4a16


class Problem:
    """A quantized weight, activations, and their product in float64."""

    def __init__(self, n, k, group_size, dtype, m=5, with_zeros=True, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        self.values = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g).to(device)
        self.scales = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(dtype).to(device)
        zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=g).to(device)
        self.zeros = zeros if with_zeros else None
        self.x = torch.randn(m, k, generator=g).to(dtype).to(device)
        self.bias = torch.randn(n, generator=g).to(dtype).to(device)
        zero = zeros.double() if with_zeros else torch.full((n, groups), 8.0, dtype=torch.float64, device=device)
        columns = torch.arange(k, device=device) // size
        weight = (self.values.double() - zero[:, columns]) * self.scales.double()[:, columns]
        self.product = self.x.double() @ weight.t()
        self.magnitude = self.x.double().abs() @ weight.abs().t()

    def pack(self, group_size, backend=None, **options):
        dtype = self.x.dtype
        return w4a16.pack(self.values, self.scales, self.zeros, group_size, dtype, backend=backend, **options)

    def error(self, y):
        return float((y.double() - self.product).norm() / self.product.norm())


TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group_size"), [(48, 256, 128), (16, 352, 128), (24, 96, -1), (8, 64, 32)])
def test_cpu_product_matches_float64(n, k, group_size, with_zeros, dtype):
    p = Problem(n, k, group_size, dtype, with_zeros=with_zeros)
    packed = p.pack(group_size)
    assert packed.backend == "dequantize"
    y = w4a16.gemm(p.x, packed)
    assert y.shape == (5, n)
    assert y.dtype == dtype
    assert p.error(y) < TOLERANCE[dtype]


def test_a_weight_dequantized_in_blocks_is_the_same(monkeypatch):
    p = Problem(20, 96, 32, torch.float32)
    monkeypatch.setattr(w4a16, "_BLOCK_VALUES", 3 * 96)
    whole = w4a16.dequantize(p.values, p.scales, p.zeros, 32)
    assert torch.equal(p.pack(32).tensors["weight"], whole)


def test_a_group_of_more_than_all_columns_is_one_scale_per_channel():
    p = Problem(16, 64, -1, torch.float32)
    packed = p.pack(128)
    assert packed.group_size == 64
    assert torch.equal(packed.tensors["weight"], p.pack(-1).tensors["weight"])


def test_bias_and_no_tokens():
    p = Problem(32, 128, 64, torch.float32)
    packed = p.pack(64)
    y = w4a16.gemm(p.x, packed, p.bias)
    assert torch.allclose(y.double(), p.product + p.bias.double(), rtol=1e-5, atol=1e-5)
    assert w4a16.gemm(p.x[:0], packed).shape == (0, 32)


def test_dequantized_values_are_those_of_the_definition():
    values = torch.tensor([[0, 15, 3, 4], [8, 9, 10, 11]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    zeros = torch.tensor([[0, 4], [8, 15]], dtype=torch.uint8)
    expected = torch.tensor([[0.0, 7.5, -2.0, 0.0], [0.0, 1.0, -1.25, -1.0]])
    assert torch.equal(w4a16.dequantize(values, scales, zeros, 2), expected)
    assert torch.equal(w4a16.dequantize(values, scales, None, 2)[0], torch.tensor([-4.0, 3.5, -10.0, -8.0]))


def test_int4_words_hold_the_first_value_lowest():
    words = w4a16._int4_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8))
    assert words.tolist() == [[0xF7654321 - 2**32]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.full((16, 64), 16, dtype=torch.uint8)}, ValueError, r"values must lie in 0\.\.15, got 16"),
        ({"values": torch.zeros(16, 64, dtype=torch.int8)}, TypeError, "values must be uint8"),
        ({"scales": torch.ones(16, 3)}, ValueError, r"scales must have shape \[16, 2\]"),
        ({"zeros": torch.full((16, 2), 16, dtype=torch.uint8)}, ValueError, r"zeros must lie in 0\.\.15"),
        ({"zeros": torch.zeros(16, 1, dtype=torch.uint8)}, ValueError, r"zeros must have shape \[16, 2\]"),
        ({"group_size": 0}, ValueError, "group_size must be positive"),
        ({"dtype": torch.float64}, TypeError, "dtype must be"),
        ({"backend": "marlin"}, ValueError, "backend must be one of"),
        ({"backend": "torch"}, ValueError, "backend 'torch' cannot be used: it needs an NVIDIA GPU"),
        ({"backend": "humming"}, ValueError, "backend 'humming' cannot be used: it needs an NVIDIA GPU"),
    ],
)
def test_pack_names_the_bad_argument(change, error, message):
    arguments = {
        "values": torch.zeros(16, 64, dtype=torch.uint8),
        "scales": torch.ones(16, 2),
        "zeros": None,
        "group_size": 32,
        **change,
    }
    with pytest.raises(error, match=message):
        w4a16.pack(**arguments)


def test_gemm_names_the_bad_argument():
    p = Problem(32, 128, 64, torch.float32)
    packed = p.pack(64)
    with pytest.raises(ValueError, match=r"x must have shape \[M, 128\]"):
        w4a16.gemm(p.x[:, :64], packed)
    with pytest.raises(TypeError, match="x must be float32"):
        w4a16.gemm(p.x.half(), packed)
    with pytest.raises(ValueError, match=r"bias must have shape \[32\]"):
        w4a16.gemm(p.x, packed, p.bias[:5])


def test_packed_weight_knows_its_size():
    packed = Problem(32, 128, 64, torch.float16).pack(64)
    assert packed.nbytes == 32 * 128 * 2


# The sizes a 7B model has, one that is no multiple of 128 groups, and one scale per output channel.
GPU_SIZES = [(512, 1024, 128), (12288, 4096, 128), (4096, 11008, 128), (256, 512, -1), (128, 384, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("backend", ["humming", "torch", "dequantize"])
@pytest.mark.parametrize(("n", "k", "group_size"), GPU_SIZES)
def test_gpu_backends_match_float64(n, k, group_size, backend, with_zeros, dtype):
    if backend == "humming":
        pytest.importorskip("humming", reason="humming-kernels is not installed")
    # PyTorch's kernel computes in bfloat16, its scales too.
    tolerance = TOLERANCE[torch.bfloat16 if backend == "torch" else dtype]
    for m in (1, 17, 300):
        p = Problem(n, k, group_size, dtype, m, with_zeros, "cuda", seed=m)
        packed = p.pack(group_size, backend)
        assert packed.backend == backend
        assert p.error(w4a16.gemm(p.x, packed)) < tolerance
        with_bias = w4a16.gemm(p.x, packed, p.bias).double() - p.bias.double()
        assert p.error(with_bias) < 2 * tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["humming", "torch"])
def test_gpu_backends_run_in_a_graph(backend):
    if backend == "humming":
        pytest.importorskip("humming", reason="humming-kernels is not installed")
    p = Problem(512, 1024, 128, torch.float16, 3, device="cuda")
    packed = p.pack(128, backend)
    w4a16.gemm(p.x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a16.gemm(p.x, packed)
    other = Problem(512, 1024, 128, torch.float16, 3, device="cuda", seed=9)
    other.values, other.scales, other.zeros = p.values, p.scales, p.zeros
    p.x.copy_(other.x)
    graph.replay()
    assert torch.equal(y, w4a16.gemm(p.x, packed))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "backend"), [(352, "torch"), (360, "dequantize")])
def test_gpu_choice_falls_back(k, backend):
    p = Problem(16, k, 128, torch.float16, device="cuda")
    packed = p.pack(128)
    assert packed.backend == backend
    assert p.error(w4a16.gemm(p.x, packed)) < TOLERANCE[torch.bfloat16]
    with pytest.raises(ValueError, match="backend 'humming' cannot be used"):
        p.pack(128, "humming")
