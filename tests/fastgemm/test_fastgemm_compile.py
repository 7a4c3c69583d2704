"""The operators as torch sees them: schemas, fake implementations, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgemm

N, K = 48, 96


def arguments(m=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (m, K), dtype=torch.int8, generator=generator)
    w = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
    return x, torch.rand(m, generator=generator), w, torch.rand(N, generator=generator)


def cases():
    x, x_scale, w, w_scale = arguments()
    h = torch.randn(5, K)
    ops = torch.ops.fastgemm
    bias = torch.randn(N).half()
    return {
        "w4a8": (ops.w4a8_gemm, (x, x_scale, fastgemm.pack(w), w_scale, bias, torch.float16)),
        "w4a8_int32": (ops.w4a8_gemm, (x, x_scale, fastgemm.pack(w), w_scale, None, torch.int32)),
        "w4a8_weights_ready": (ops.w4a8_gemm, (x, x_scale, fastgemm.pack(w), w_scale, None, torch.float16, 0, True)),
        "w8a8": (ops.w8a8_gemm, (x, x_scale, w, w_scale, None, torch.bfloat16)),
        "quantize": (ops.quantize_per_token, (h,)),
        "rms_norm": (ops.rms_norm_quant, (h, torch.ones(K), 1e-6)),
        "add_rms_norm": (ops.add_rms_norm_quant, (h, h + 1, torch.ones(K), 1e-6)),
        "silu_mul": (ops.silu_mul_quant, (h,)),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name):
    operator, args = cases()[name]
    torch.library.opcheck(operator.default, args)


def transposed(tensor):
    """The same activations, column by column in memory."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("arranged", [lambda t: t, transposed])
@pytest.mark.parametrize("name", list(cases()))
def test_fake_implementation_agrees_with_the_real_one(name, arranged):
    operator, args = cases()[name]
    activations = 2 if name == "add_rms_norm" else 1
    args = (*map(arranged, args[:activations]), *args[activations:])
    real = operator(*args)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
    assert [(r.shape, r.dtype, r.stride()) for r in real] == [(f.shape, f.dtype, f.stride()) for f in fake]


def test_fake_implementations_check_arguments():
    x, x_scale, w, w_scale = arguments()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, x_scale, w, w_scale)]
        with pytest.raises(ValueError, match="x_scale must have shape"):
            fastgemm.w8a8_gemm(fakes[0][:-1], *fakes[1:])


def test_compiled_layer_equals_eager_for_any_number_of_tokens():
    _, _, w, w_scale = arguments()
    packed, norm = fastgemm.pack(w), torch.rand(K)

    def layer(h, residual):
        q, scale, residual = fastgemm.rms_norm_quant(h, norm, 1e-6, residual)
        y = fastgemm.w4a8_gemm(q, scale, packed, w_scale, out_dtype=torch.float32, weights_ready=True)
        q, scale = fastgemm.silu_mul_quant(y)
        return q.float() * scale[:, None], residual

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (4, 9, 33):
        h, residual = torch.randn(m, K), torch.randn(m, K)
        for got, expected in zip(compiled(h, residual), layer(h, residual), strict=True):
            assert torch.equal(got, expected)
