"""Each linear layer of the engine against the quantized layer that Transformers models carry."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

import fastgemm
from odyssey.engine import Engine, random_weights
from odyssey.engine.formats import FORMATS, LinearFormat, format_of
from odyssey.engine.linear import quantized_linear, random_linear
from odyssey.engine.weights import _common_order
from odyssey.errors import UnsupportedError
from odyssey.quantization.grid import round_to_nearest
from odyssey.quantization.linear import QuantizedLinear
from odyssey.quantization.scheme import QuantizedWeight, QuantScheme

OUT, IN, TOKENS = 96, 256, 5
SCHEMES = {
    "w8a8": QuantScheme(8),
    "w4a8": QuantScheme(4),
    "w4a8-g128": QuantScheme(4, 128),
    "w4a16-g128": QuantScheme(4, 128, True, 16),
    "w4a16-g128 with zero points": QuantScheme(4, 128, False, 16),
    "w4a16-g64": QuantScheme(4, 64, False, 16),
    "w4a16": QuantScheme(4, -1, True, 16),
}


def _generator(seed=1):
    return torch.Generator().manual_seed(seed)


def _weight(scheme, ordered):
    weight = round_to_nearest(torch.randn(OUT, IN, generator=_generator()), scheme)
    order = torch.randperm(IN, generator=_generator()) if ordered else None
    return QuantizedWeight(weight.values, weight.scales, scheme, weight.zeros, order)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_layer_computes_what_its_integers_say(scheme, biased, ordered):
    weight = _weight(scheme, ordered)
    bias = torch.randn(OUT, generator=_generator()) if biased else None
    x = torch.randn(TOKENS, IN, generator=_generator(2))
    layer = quantized_linear(weight, bias, format_of(scheme), torch.float32)
    expected = QuantizedLinear(weight, bias)(x)
    assert layer.takes_int8 == (scheme.activation_bits == 8)
    actual = layer(fastgemm.quantize_per_token(x) if layer.takes_int8 else x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_random_layers_have_the_spread_of_trained_ones(form):
    layer = random_linear(form, (256, 512), True, torch.float32, torch.device("cpu"), _generator())
    x = torch.randn(64, 512, generator=_generator(2))
    y = layer(fastgemm.quantize_per_token(x) if layer.takes_int8 else x)
    # 512 terms of variance 0.02^2.
    assert float(y.std()) == pytest.approx(512**0.5 * 0.02, rel=0.1)
    assert float(y.mean()) == pytest.approx(0, abs=0.02)
    # What all inputs have in common is not passed on: a mean of a tenth of the weights' spread would give 1.0 here.
    common = torch.ones(1, 512)
    y = layer(fastgemm.quantize_per_token(common) if layer.takes_int8 else common)
    assert abs(float(y.mean())) < 0.1


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_activations_of_random_layers_do_not_grow_without_bound(form):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, vocab_size=512,
        max_position_embeddings=64,
    )  # fmt: skip
    engine = Engine(random_weights(config, form, "cpu", torch.float32), batch_size=1, max_len=64)
    norm, residuals = engine._decoder._norm, []

    def watched(*arguments, **options):
        result = norm(*arguments, **options)
        residuals.append(result[1])
        return result

    engine._decoder._norm = watched
    assert torch.isfinite(engine.prefill(torch.arange(16)[None])).all()
    # Each layer adds about as much as the one before it; what all channels have in common is no part of it.
    last = residuals[-1]
    assert abs(float(last.mean())) < 0.2 * float(last.std())
    assert float(last.std()) < 8


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if form.kernel not in ("float", "w4a16")], ids=str)
def test_bytes_of_a_layer_are_those_of_its_format(form):
    layer = random_linear(form, (256, 512), False, torch.float16, torch.device("cpu"), _generator())
    assert layer.nbytes == form.weight_bytes(256, 512)


def test_a_size_that_the_kernel_does_not_take_is_refused():
    weight = round_to_nearest(torch.randn(33, 40, generator=_generator()), QuantScheme(4))
    with pytest.raises(UnsupportedError, match=r"\[33, 40\] does not fit w4a8"):
        quantized_linear(weight, None, FORMATS["w4a8"], torch.float32)


def test_layers_of_different_orders_cannot_be_merged():
    ordered = _weight(QuantScheme(4), True)
    assert torch.equal(_common_order([ordered, ordered], "x"), ordered.order)
    assert _common_order([_weight(QuantScheme(4), False)] * 2, "x") is None
    with pytest.raises(UnsupportedError, match="different orders"):
        _common_order([ordered, _weight(QuantScheme(4), False)], "layer 0: q, k")


def test_input_multiples():
    assert [form.input_multiple() for form in FORMATS.values()] == [1, 32, 128, 32, 128]
    assert LinearFormat("x", "w4a16", 4, 48).input_multiple() == 96
