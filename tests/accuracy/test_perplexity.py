import json
import math
import random

import numpy as np
import pytest
import torch
from helpers.cells import cell_config
from helpers.checkpoints import byte_tokenizer, write_checkpoint
from transformers import AutoModelForCausalLM

from odyssey.accuracy.perplexity import document_windows, perplexity, stream_windows
from odyssey.cell import Cell
from odyssey.config import AccuracyConfig, DataConfig, PerplexityConfig
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


def test_a_bos_stands_at_the_start_of_the_whole_text_alone():
    windows = stream_windows(Corpus("file", [TEXT[:300], TEXT[300:]], "text"), byte_tokenizer(bos=True), window=96)
    assert windows.flatten().tolist() == [0, *byte_tokenizer()(f"{TEXT[:300]}\n\n{TEXT[300:]}").input_ids][:960]


def test_every_c4_document_has_a_bos():
    """A document of 48 tokens and the BOS is longer than a window of 48: its only window begins with it."""
    corpus = Corpus("c4", [TEXT[:47], TEXT[:48]], "shard")
    windows = document_windows(corpus, byte_tokenizer(bos=True), window=48, count=3, seed=0)
    assert windows.tolist() == [[0, *byte_tokenizer()(TEXT[:47]).input_ids]] * 3


def test_a_c4_document_of_a_window_is_drawn_again():
    corpus = Corpus("c4", [TEXT[1:49], TEXT[:49]], "shard")
    windows = document_windows(corpus, byte_tokenizer(), window=48, count=9, seed=0)
    assert windows.tolist() == [byte_tokenizer()(TEXT[:48]).input_ids] * 9


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


def _documents(count=60):
    """Of all lengths; a window of 48 bytes, which are tokens here, fits into some."""
    letters = [chr(97 + (5 * i * i + 3 * i) % 26) for i in range(400)]
    return ["".join(letters[n : n + 5 + (37 * n) % 120]) for n in range(count)]


def _gptq_windows(documents, tokenizer, window, count, seed):
    """The loop of GPTQ's reference code for C4's validation shard, on the global generator as there."""
    state = random.getstate()
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            tokens = tokenizer(documents[i]).input_ids
            if len(tokens) > window:
                break
        i = random.randint(0, len(tokens) - window - 1)
        windows.append(tokens[i : i + window])
    random.setstate(state)
    return windows


@pytest.mark.parametrize("seed", [0, 3])
def test_c4_windows_are_drawn_as_in_gptqs_code(seed):
    documents, tokenizer = _documents(), byte_tokenizer()
    state = random.getstate()
    found = document_windows(Corpus("c4", documents, "shard"), tokenizer, window=48, count=40, seed=seed)
    assert random.getstate() == state
    assert found.tolist() == _gptq_windows(documents, tokenizer, 48, 40, seed)


def test_c4_has_256_windows_unless_fewer_are_asked_for(model):
    corpus = Corpus("c4", _documents(), "shard")
    whole = perplexity(model, byte_tokenizer(), corpus, window=48)
    part = perplexity(model, byte_tokenizer(), corpus, window=48, max_windows=20)
    other = perplexity(model, byte_tokenizer(), corpus, window=48, max_windows=20, seed=1)
    assert (whole["windows"], whole["tokens"], whole["dataset"]) == (256, 256 * 48, "c4")
    assert part["nll"] == whole["nll"][:20]
    assert other["tokens_sha256"] != part["tokens_sha256"]
    assert [each["protocol"] for each in (whole, part, other)] == [
        f"windows of {count} random documents that are long enough, seed {seed}"
        for count, seed in ((256, 0), (20, 0), (20, 1))
    ]
    expected = []
    for tokens in _gptq_windows(corpus.documents, byte_tokenizer(), 48, 20, 0):
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None]).logits[0].double().numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected.append(-np.mean([log_probabilities[i, tokens[i + 1]] for i in range(47)]))
    assert part["value"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


def test_c4_without_a_long_document_is_missing_data(model):
    with pytest.raises(MissingDataError, match="no document of shard has more than accuracy.perplexity.window=250"):
        perplexity(model, byte_tokenizer(), Corpus("c4", _documents(), "shard"), window=250)


def test_a_cell_measures_several_data_sets(tmp_path, no_hub):
    """One that is missing costs no other."""
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/wiki.test.raw").write_text(TEXT[:500] + "\n")
    shard = tmp_path / "c4/c4-validation.jsonl"
    record = _cell(tmp_path, also=["c4", "embedded"])
    assert record["outcome"] == "missing-data"
    assert "fetch --tasks c4" in record["reason"]
    assert list(record["accuracy"]["perplexity"]) == ["wikitext2", "embedded"]
    shard.parent.mkdir()
    shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in _documents()))
    record = _cell(tmp_path, also=["c4"])
    results = record["accuracy"]["perplexity"]
    assert record["outcome"] == "ok"
    assert list(results) == ["wikitext2", "c4"]
    assert (results["c4"]["windows"], results["c4"]["simulated"]) == (6, False)
    named = _cell(tmp_path, dataset="c4", path=str(shard), also=["wikitext2"])["accuracy"]["perplexity"]
    assert named["c4"]["nll"] == results["c4"]["nll"]
    assert named["wikitext2"]["nll"] == results["wikitext2"]["nll"]


def _cell(root, dataset="wikitext2", **settings):
    group = PerplexityConfig(dataset=dataset, window=48, max_windows=6, **settings)
    config = cell_config(
        root, write_checkpoint(root / "model"), "fp16", accuracy=AccuracyConfig(perplexity=group),
        data=DataConfig(root=str(root)),
    )  # fmt: skip
    return Cell(config, {}, "digest", root / "cell").run()
