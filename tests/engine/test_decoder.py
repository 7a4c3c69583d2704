"""Logits of the engine against the Transformers model that carries the same integers.

Tolerances, all of the relative error of a token's logits. In float32 on a CPU both compute the same sums in another
order: a few hundred roundings of 2^-24, bounded here by 1e-5. With integer activations such a rounding can put a value
on the other side of a border of the int8 grid; that moves it by a whole step, and every later token that attends to it
sees it. In these random networks one such step changes logits by up to 2e-2 (so much do the integer and the simulated
arithmetic of the same layer differ, too), so there a third of the tokens must agree to 1e-5 and all to 5e-2; another
angle, mask or scale would change every token by more.
In half precision the float32 model is the truth and the engine may be at most twice as far from it as Transformers in
that dtype is: both round after every operation, in different places. One int8 step comes on top.
"""

from __future__ import annotations

import pytest
import torch

from odyssey.engine import Engine, load_weights
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.checkpoint import load_quantized

PROMPT, STEPS, BATCH = 37, 5, 3
INTEGER_FORMATS = ("w8a8", "w4a8", "w4a8-g128", "w4a16-g128")
SAME, ONE_STEP = 1e-5, 5e-2
MODELS = ("gqa", "mha", "tied", "qwen2-bias", "llama3-rope", "sliding-window")


def _tokens(length=PROMPT + STEPS):
    return torch.randint(256, (BATCH, length), generator=torch.Generator().manual_seed(5))


def _reference(directory, form, device, dtype):
    if form == "fp16":
        return load_model(resolve_model("model", path=str(directory)), device, dtype)
    return load_quantized(directory, device, dtype)


@torch.inference_mode()
def _expected(model, tokens):
    """Logits behind the prompt and behind each later token: float32 [STEPS, BATCH, vocabulary]."""
    logits = model(tokens[:, :-1]).logits.float()
    return logits[:, PROMPT - 1 :].transpose(0, 1).cpu()


def _engine_logits(engine, tokens):
    tokens = tokens.to(engine.device)
    outputs = [engine.prefill(tokens[:, :PROMPT])]
    outputs += [engine.decode_logits(tokens[:, PROMPT + step]) for step in range(STEPS - 1)]
    return torch.stack([output.float().cpu() for output in outputs])


def _errors(actual, expected):
    """Relative error of every token's logits."""
    assert torch.isfinite(actual).all()
    return (actual - expected).norm(dim=-1).flatten() / expected.norm(dim=-1).flatten()


def _error(actual, expected):
    return float(_errors(actual, expected).square().mean().sqrt())


def _check_float32(actual, expected, takes_int8):
    errors = _errors(actual, expected)
    if takes_int8:
        assert errors.quantile(1 / 3) < SAME
        assert errors.max() < ONE_STEP
    else:
        assert errors.max() < SAME


@pytest.mark.parametrize("form", ["fp16", *INTEGER_FORMATS])
@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_agree_with_transformers(name, form, checkpoints, quantized):
    directory = checkpoints(name) if form == "fp16" else quantized(name, form)
    weights = load_weights(directory)
    assert weights.format.name == form
    engine = Engine(weights, batch_size=BATCH, max_len=PROMPT + STEPS)
    expected = _expected(_reference(directory, form, "cpu", torch.float32), _tokens())
    _check_float32(_engine_logits(engine, _tokens()), expected, weights.format.takes_int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["fp16", *INTEGER_FORMATS])
@pytest.mark.parametrize("name", ["gqa", "qwen2-bias"])
def test_half_precision_logits_are_as_near_to_float32_as_transformers_are(
    name, form, dtype, device, checkpoints, quantized
):
    directory = checkpoints(name) if form == "fp16" else quantized(name, form)
    engine = Engine(load_weights(directory, device, dtype), batch_size=BATCH, max_len=PROMPT + STEPS)
    truth = _expected(_reference(directory, form, "cpu", torch.float32), _tokens())
    theirs = _error(_expected(_reference(directory, form, device, dtype), _tokens().to(device)), truth)
    assert 0 < theirs < 0.2
    step = ONE_STEP if engine.weights.format.takes_int8 else 0.0
    assert _error(_engine_logits(engine, _tokens()), truth) < 2 * theirs + step


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_on_a_gpu(name, quantized):
    directory = quantized(name, "w4a8")
    weights = load_weights(directory, "cuda", torch.float16)
    engine = Engine(weights, batch_size=BATCH, max_len=PROMPT + STEPS)
    truth = _expected(_reference(directory, "w4a8", "cpu", torch.float32), _tokens())
    theirs = _error(_expected(_reference(directory, "w4a8", "cuda", torch.float16), _tokens().cuda()), truth)
    assert _error(_engine_logits(engine, _tokens()), truth) < 2 * theirs + ONE_STEP


@pytest.mark.parametrize("prefill_tokens", [1, 7, 16, PROMPT, 2 * PROMPT])
@pytest.mark.parametrize("name", ["gqa", "sliding-window"])
def test_prefill_in_chunks_equals_whole_prefill(name, prefill_tokens, device, quantized):
    weights = load_weights(quantized(name, "w4a8"), device, torch.float32 if device.type == "cpu" else torch.float16)
    sizes = {"batch_size": BATCH, "max_len": PROMPT + STEPS}
    whole = _engine_logits(Engine(weights, **sizes), _tokens())
    chunked = _engine_logits(Engine(weights, **sizes, prefill_tokens=prefill_tokens), _tokens())
    # The same operations on other shapes: sums in another order.
    if device.type == "cpu":
        _check_float32(chunked, whole, takes_int8=True)
    else:
        assert _error(chunked, whole) < 2 * ONE_STEP


def test_an_intermediate_size_that_no_kernel_takes_is_padded(tmp_path, quantized):
    from helpers.checkpoints import write_checkpoint

    write_checkpoint(tmp_path / "odd", layers=2, hidden=128, intermediate=172, heads=4, kv_heads=2)
    for form in INTEGER_FORMATS:
        directory = quantized(str(tmp_path / "odd"), form)
        engine = Engine(load_weights(directory), batch_size=BATCH, max_len=PROMPT + STEPS)
        expected = _expected(_reference(directory, form, "cpu", torch.float32), _tokens())
        _check_float32(_engine_logits(engine, _tokens()), expected, engine.weights.format.takes_int8)
