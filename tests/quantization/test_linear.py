import numpy as np
import pytest
import torch
from torch import nn

from odyssey.quantization.grid import round_to_nearest
from odyssey.quantization.linear import QuantizedLinear, replace_linears
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme

IN, OUT, TOKENS = 160, 48, 7


def _random(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    x = torch.randn(TOKENS, IN, generator=generator) * torch.logspace(-2, 2, TOKENS)[:, None]
    return weight, x, torch.randn(OUT, generator=generator)


def _exact(weight, x, bias):
    """float64 NumPy of the definition: per-token int8 activations times the integers, scaled."""
    x = x.numpy().astype(np.float32)
    scales = (np.abs(x).max(1) / np.float32(127)).astype(np.float32)
    integers = np.clip(np.rint(x / scales[:, None]), -128, 127).astype(np.float64)
    group = IN if weight.scheme.group_size == PER_CHANNEL else weight.scheme.group_size
    per_column = np.repeat(weight.scales.numpy(), group, axis=1)[:, :IN].astype(np.float64)
    dequantized = weight.values.numpy().astype(np.float64) * per_column
    output = (integers @ dequantized.T) * scales[:, None].astype(np.float64)
    return output if bias is None else output + bias.numpy()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [PER_CHANNEL, 32, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_integers_against_float64(bits, group_size, with_bias):
    weight, x, bias = _random()
    bias = bias if with_bias else None
    quantized = round_to_nearest(weight, QuantScheme(bits, group_size))
    exact = _exact(quantized, x, bias)
    magnitude = np.abs(exact).max(1, keepdims=True)
    integer = QuantizedLinear(quantized, bias)(x).numpy()
    simulated = QuantizedLinear(quantized, bias, backend="simulate")(x).numpy()
    # Integer sums are exact, so only the scalings (and a sum over groups) round: a few float32 ulps of the result.
    # The simulation rounds every product and sum in float32: at most IN * 2^-24 of sum |x w|, far less in practice.
    assert np.abs(integer - exact).max() / magnitude.max() < 1e-6
    assert (np.abs(integer - exact) <= 4e-7 * magnitude + 1e-6 * np.abs(exact)).all()
    assert (np.abs(simulated - integer) <= IN * 2.0**-24 * magnitude * 10).all()


def test_integer_arithmetic_is_exact_where_floats_are_not():
    # 2^24 + 1 needs 25 bits: a float32 accumulation loses the 1, an int32 accumulation does not.
    columns = 20_000
    scheme = QuantScheme(8)
    weight = torch.full((1, columns), 127.0)
    quantized = round_to_nearest(weight, scheme)
    x = torch.full((1, columns), 127.0)
    x[0, -1] = 126.0
    y = QuantizedLinear(quantized)(x)
    assert y.item() == np.float32(127 * (127 * (columns - 1) + 126))


def test_weight_only_multiplies_by_the_dequantized_weight():
    weight, x, bias = _random()
    layer = QuantizedLinear(round_to_nearest(weight, QuantScheme(4, 32, False, 16)), bias)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantized(), bias))


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (17, 33), (43, 172), (64, 172)])
@pytest.mark.parametrize("group_size", [PER_CHANNEL, 128])
def test_odd_shapes_equal_the_simulation(out, columns, group_size):
    generator = torch.Generator().manual_seed(out)
    weight, x = torch.randn(out, columns, generator=generator), torch.randn(5, columns, generator=generator)
    bias = torch.randn(out, generator=generator)
    quantized = round_to_nearest(weight, QuantScheme(4, group_size))
    integer = QuantizedLinear(quantized, bias)(x)
    torch.testing.assert_close(integer, QuantizedLinear(quantized, bias, "simulate")(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_dtype_and_leading_dimensions(dtype):
    weight, x, _ = _random()
    layer = QuantizedLinear(round_to_nearest(weight, QuantScheme(4)))
    output = layer(x.reshape(1, TOKENS, IN).to(dtype))
    assert output.dtype == dtype
    assert output.shape == (1, TOKENS, OUT)


def test_replace_linears_keeps_biases():
    block = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, OUT, bias=False)})
    bias = block["a"].bias.clone()
    weights = {name: round_to_nearest(block[name].weight.detach(), QuantScheme(4)) for name in ("a", "b")}
    replace_linears(block, weights)
    assert torch.equal(block["a"].bias, bias)
    assert block["b"].bias is None
    assert torch.equal(block["a"].weight().values, weights["a"].values)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [IN, 44])
def test_gpu_equals_cpu(bits, dtype, columns):
    weight, x, bias = _random()
    weight, x = weight[:43, :columns], x[:, :columns]
    bias = bias[:43]
    quantized = round_to_nearest(weight, QuantScheme(bits))
    on_cpu = QuantizedLinear(quantized, bias)(x.to(dtype))
    layer = QuantizedLinear(quantized, bias).cuda()
    on_gpu = layer(x.to(dtype).cuda())
    assert torch.equal(on_gpu.cpu(), on_cpu)
    assert (layer.packed is not None) == (bits <= 4)
    assert torch.equal(layer.weight().values.cpu(), quantized.values)
