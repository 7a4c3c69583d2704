import math

import numpy as np
import pytest
import torch
from helpers.checkpoints import byte_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM

from odyssey.accuracy.perplexity import perplexity
from odyssey.data.texts import Corpus, load_corpus
from odyssey.errors import MissingDataError

TEXT = "".join(chr(97 + (7 * i * i + i) % 26) for i in range(1000))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32, weight_std=0.3)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_equals_a_float64_computation(model):
    window = 96
    result = perplexity(model, byte_tokenizer(), Corpus("file", [TEXT], "text"), window=window)
    tokens = np.array(byte_tokenizer()(TEXT).input_ids)
    windows = len(tokens) // window
    means = []
    for index in range(windows):
        chunk = tokens[index * window : (index + 1) * window]
        with torch.no_grad():
            logits = model(torch.from_numpy(chunk)[None]).logits[0].double().numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        means.append(-np.mean([log_probabilities[i, chunk[i + 1]] for i in range(window - 1)]))
    assert result["value"] == pytest.approx(math.exp(np.mean(means)), rel=1e-6)
    assert result["nll"] == pytest.approx(means, rel=1e-5)
    assert (result["windows"], result["tokens"]) == (windows, windows * window)
    assert result["stderr"] == pytest.approx(result["value"] * np.std(means, ddof=1) / math.sqrt(windows), rel=1e-4)


def test_max_windows_takes_the_first(model):
    corpus = Corpus("file", [TEXT], "text")
    whole = perplexity(model, byte_tokenizer(), corpus, window=64)
    part = perplexity(model, byte_tokenizer(), corpus, window=64, max_windows=3)
    assert part["nll"] == whole["nll"][:3]
    assert part["tokens_sha256"] != whole["tokens_sha256"]
    assert part["text_sha256"] == whole["text_sha256"]


def test_a_text_shorter_than_a_window_is_refused(model):
    with pytest.raises(MissingDataError, match=r"has 1000 tokens, fewer than accuracy.perplexity.window=2048"):
        perplexity(model, byte_tokenizer(), Corpus("file", [TEXT], "text"), window=2048)


def test_a_loss_that_is_not_finite_is_an_error(model):
    weight = model.model.norm.weight
    saved = weight.data.clone()
    weight.data[0] = float("nan")
    try:
        with pytest.raises(ValueError, match="not finite"):
            perplexity(model, byte_tokenizer(), Corpus("file", [TEXT], "text"), window=64)
    finally:
        weight.data.copy_(saved)


@pytest.mark.slow
def test_published_value_of_the_testbed(evaluation_data):
    """fp32 perplexity of testbed-28m on WikiText-2's test tokens, 2048-token windows: 35.8."""
    from odyssey.models.load import load_model, load_tokenizer
    from odyssey.models.source import resolve_model

    source = resolve_model("testbed", path=str(evaluation_data / "models/testbed-28m"))
    corpus = load_corpus("file", "test", path=str(evaluation_data / "data/wikitext2/wiki.test.tokens"))
    result = perplexity(load_model(source), load_tokenizer(source), corpus)
    assert result["value"] == pytest.approx(35.8, abs=0.05)
