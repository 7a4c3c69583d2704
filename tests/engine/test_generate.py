"""Text of the engine, token by token, against Transformers; batches, limits and the command."""

from __future__ import annotations

import pytest
import torch

from odyssey import generate
from odyssey.engine import Engine, Sampling, load_weights
from odyssey.models.embedded import TINY_PATH
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.checkpoint import load_quantized

NEW_TOKENS = 24
FORMATS = ("fp16", "w8a8", "w4a8", "w4a8-g128", "w4a16-g128")


def _prompts(vocabulary, lengths):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def _check_greedy(model, prompt, tokens, margin):
    """Every token is the one that `model` finds likeliest behind what came before, up to `margin` in its logits."""
    sequence = torch.tensor([prompt + tokens], device=model.device)
    logits = model(sequence[:, :-1]).logits[0, len(prompt) - 1 :].float().cpu()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= margin


def _model(directory, form, device):
    if form == "fp16":
        return load_model(resolve_model("model", path=str(directory)), device)
    return load_quantized(directory, device)


@pytest.mark.parametrize("form", FORMATS)
def test_greedy_text_of_the_tiny_model(form, device, quantized):
    directory = TINY_PATH if form == "fp16" else quantized(str(TINY_PATH), form)
    engine = Engine(load_weights(directory, device), batch_size=3, max_len=128)
    prompts = _prompts(1024, [1, 17, 40])
    results = engine.generate(prompts, NEW_TOKENS)
    model = _model(directory, form, device)
    for prompt, tokens in zip(prompts, results, strict=True):
        assert len(tokens) == NEW_TOKENS
        # float16 logits of about 10 have steps of 1/128; the sums behind them differ by a few.
        _check_greedy(model, prompt, tokens, 1e-2 if device.type == "cpu" else 8e-2)


@pytest.mark.parametrize("form", FORMATS)
def test_greedy_text_of_a_trained_model(form, device, evaluation_data, quantized):
    source = evaluation_data / "models" / "testbed-28m"
    if not source.is_dir():
        pytest.skip(f"no model at {source}")
    directory = source if form == "fp16" else quantized(str(source), form)
    engine = Engine(load_weights(directory, device), batch_size=2, max_len=128)
    prompts = _prompts(8192, [9, 33])
    results = engine.generate(prompts, NEW_TOKENS)
    model = _model(directory, form, device)
    for prompt, tokens in zip(prompts, results, strict=True):
        _check_greedy(model, prompt, tokens, 1e-2 if device.type == "cpu" else 8e-2)


def test_float32_text_is_transformers_text_to_the_token(checkpoints):
    directory = checkpoints("gqa")
    prompts = _prompts(256, [5, 1, 30])
    results = Engine(load_weights(directory), batch_size=3, max_len=64).generate(prompts, NEW_TOKENS)
    model = _model(directory, "fp16", "cpu")
    for prompt, tokens in zip(prompts, results, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
        assert tokens == expected[0, len(prompt) :].tolist()


def test_a_batch_of_different_prompts_gives_what_each_gives_alone(device, quantized):
    weights = load_weights(quantized("gqa", "w4a8"), device)
    engine = Engine(weights, batch_size=4, max_len=96, prefill_tokens=32)
    prompts = _prompts(256, [50, 3, 31, 32])
    together = engine.generate(prompts, NEW_TOKENS)
    alone = [engine.generate([prompt], NEW_TOKENS)[0] for prompt in prompts]
    if device.type == "cpu":
        assert together == alone
    else:
        # Other tiles, other roundings: near ties may go the other way, after which the texts part.
        assert sum(a[0] == b[0] for a, b in zip(together, alone, strict=True)) >= 3


def test_a_sequence_ends_behind_its_end_token_and_the_others_go_on(device, checkpoints):
    engine = Engine(load_weights(checkpoints("gqa"), device), batch_size=2, max_len=64)
    prompts = _prompts(256, [6, 9])
    free = engine.generate(prompts, NEW_TOKENS)
    end = free[0][10]
    stopped = engine.generate(prompts, NEW_TOKENS, eos_tokens=[end])
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_tokens_are_streamed_as_they_come(checkpoints):
    engine = Engine(load_weights(checkpoints("gqa")), batch_size=2, max_len=64)
    seen = {0: [], 1: []}
    calls = []

    def on_tokens(row, tokens):
        seen[row] += tokens
        calls.append(len(tokens))

    prompts = _prompts(256, [6, 9])
    results = engine.generate(prompts, NEW_TOKENS, on_tokens=on_tokens)
    assert [seen[0], seen[1]] == results
    assert set(calls) == {1}


def test_sampled_text_depends_on_the_seed_alone(device, checkpoints):
    engine = Engine(load_weights(checkpoints("gqa"), device), batch_size=2, max_len=64)
    prompts = _prompts(256, [6, 9])
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95)
    first = engine.generate(prompts, NEW_TOKENS, sampling=sampling, seed=1)
    assert engine.generate(prompts, NEW_TOKENS, sampling=sampling, seed=1) == first
    assert engine.generate(prompts, NEW_TOKENS, sampling=sampling, seed=2) != first
    assert engine.generate(prompts, NEW_TOKENS) != first


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([[1] * 60], 8, "the cache holds 64"),
        ([[1], [2], [3]], 4, "3 prompts for a cache of 2"),
        ([[1], []], 4, "a prompt must have 1 to 64 tokens"),
        ([], 4, "0 prompts for a cache of 2"),
        ([[1], [3, 256]], 4, "token 256: the model's vocabulary has the tokens 0 to 255"),
        ([[-1, 256]], 4, "token -1: the model's vocabulary"),
        ([[1]], 0, "max_new_tokens must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(prompts, new_tokens, message, checkpoints):
    engine = Engine(load_weights(checkpoints("gqa")), batch_size=2, max_len=64)
    # Nothing is captured for what cannot run.
    engine.prepare = lambda *_: pytest.fail("it went on")
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, new_tokens)


def test_the_command_prints_the_text(capsys):
    assert generate.main(["--checkpoint", "tiny", "--prompt", "The", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("The")
    assert len(output.out.strip()) > len("The")
    assert "8 tokens" in output.err or "tokens in" in output.err


def test_the_command_refuses_what_does_not_fit_before_it_loads(monkeypatch, capsys):
    monkeypatch.setattr("odyssey.engine.memory.available_bytes", lambda device: 2**20)
    assert generate.main(["--checkpoint", "tiny", "--prompt", "The", "--device", "cpu"]) == 1
    assert "tiny: predicted 1.0 GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/nowhere"], "--checkpoint /nowhere: no such directory"),
        (["--checkpoint", "tiny", "--max-new-tokens", "5000"], "the model takes 512"),
        (["--checkpoint", "tiny", "--max-new-tokens", "-3"], "--max-new-tokens -3: must be at least 1"),
        (["--checkpoint", "tiny", "--top-p", "2"], "top_p must be above 0"),
        (["--checkpoint", "tiny", "--seed", "9223372036854775808"], "--seed 9223372036854775808: must be 0 to"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert generate.main([*arguments, "--prompt", "The", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
