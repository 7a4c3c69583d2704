"""Log-likelihoods of our lm-eval adapter, which computes shared beginnings once, against lm-eval's own HFLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.checkpoints import byte_tokenizer, write_checkpoint
from helpers.tasks import requests_of

from odyssey.accuracy import adapter
from odyssey.accuracy.adapter import HarnessModel
from odyssey.accuracy.prefix_tree import pack
from odyssey.errors import UnsupportedError
from odyssey.methods import build_method, settings_class
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.source import resolve_model
from odyssey.progress import Progress
from odyssey.quantization.checkpoint import load_quantized
from odyssey.quantization.linear import QuantizedLinear
from odyssey.quantization.pipeline import quantize_checkpoint

# Every task type of the paper: one continuation, endings of a context, contexts of an ending, letters after examples.
TASKS = [
    ("lambada_openai", 0), ("piqa", 0), ("hellaswag_preprocessed", 0), ("winogrande", 0), ("arc_easy", 0),
    ("mmlu_astronomy", 5),
]  # fmt: skip
MODELS = ("testbed-28m", "stories260k")


def plain(model, tokenizer, batch_size=4):
    from lm_eval.models.huggingface import HFLM

    prefix = model.config.bos_token_id if tokenizer.bos_token_id is None else None
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        softmax_dtype=torch.float32,
        prefix_token_id=prefix,
    )


def answers_of(requests, scores):
    """Index of the likeliest continuation of each item."""
    items = {}
    for request, (value, _) in zip(requests, scores, strict=True):
        items.setdefault(request.doc_id, []).append(value)
    return {doc: int(np.argmax(values)) for doc, values in items.items()}


@pytest.fixture(scope="module")
def data(evaluation_data, tmp_path_factory):
    return evaluation_data / "data", tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=MODELS)
def source(request, evaluation_data):
    return resolve_model(request.param, path=str(evaluation_data / "models" / request.param))


@pytest.fixture(scope="module")
def full_precision(source):
    return load_model(source), load_tokenizer(source)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rtn")
    method = build_method("rtn", settings_class("rtn")())
    quantize_checkpoint(source, method, {}, None, directory, device=torch.device("cpu"), seed=0)
    return load_quantized(directory), load_tokenizer(source)


@pytest.mark.parametrize(("name", "shots"), TASKS)
def test_likelihoods_are_those_of_lm_evals_adapter(full_precision, data, name, shots):
    """Float32: the same sums in another order. Items of 4 choices and prompts that are cut included."""
    requests = requests_of(name, shots, 3 if shots else 12, *data)
    lm = HarnessModel(*full_precision, 8, batch_tokens=1500)
    found = lm.loglikelihood(requests)
    expected = plain(*full_precision).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert answers_of(requests, found) == answers_of(requests, expected)
    assert lm.requests == len(requests)


def scorable(requests, lm, reference):
    """Without the items that neither adapter can score: an answer longer than the model's context."""
    too_long = {each.doc_id for each in requests if len(lm.tok_encode(each.args[1])) > lm.max_length}
    if too_long:
        both = [each for each in requests if each.doc_id in too_long]
        with pytest.raises(UnsupportedError, match="cannot be scored by a model of"):
            lm.loglikelihood(both)
        with pytest.raises(AssertionError):
            reference.loglikelihood(both, disable_tqdm=True)
        lm.start("again", Progress.silent())
    assert len(too_long) < 0.01 * len({each.doc_id for each in requests})
    return [each for each in requests if each.doc_id not in too_long]


def _whole(device):
    marks = pytest.mark.gpu if device == "cuda" else ()
    return [pytest.param(device, *task, marks=marks, id=f"{device}-{task[0]}") for task in TASKS]


@pytest.mark.parametrize(("device", "name", "shots"), [*_whole("cpu"), *_whole("cuda")])
def test_figures_of_a_task_are_those_of_lm_evals_adapter(source, data, device, name, shots):
    """The fp16 checkpoint in float32 arithmetic, on a GPU the whole task, here its first items: the same answer to
    every item. Only choices that are as good as equal may change places."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, tokenizer = load_model(source, device, torch.float32), load_tokenizer(source)
    requests = requests_of(name, shots, None if device == "cuda" else 3, *data)
    lm = HarnessModel(model, tokenizer, 64, batch_tokens=16384)
    reference = plain(model, tokenizer, batch_size=64 if device == "cuda" else 4)
    requests = scorable(requests, lm, reference)
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    found = lm.loglikelihood(requests)
    before, after = (np.array([value for value, _ in scores]) for scores in (expected, found))
    assert np.abs(after - before).max() < 1e-3
    greedy = sum(old != new for (_, old), (_, new) in zip(expected, found, strict=True))
    items, changed = {}, []
    for request, old, new in zip(requests, before, after, strict=True):
        items.setdefault(request.doc_id, []).append((old, new, len(request.args[1])))
    for item in items.values():
        old, new, lengths = (np.array(each) for each in zip(*item, strict=True))
        for scale in (1, lengths):
            if np.argmax(old / scale) != np.argmax(new / scale):
                changed.append(np.ptp(np.sort(old / scale)[-2:]))
    assert all(margin < 1e-4 for margin in changed)
    assert max(len(changed), greedy) <= 1e-3 * len(items)
    assert (lm.gpu_seconds is not None) == (device == "cuda")
    ratio, largest = lm.tokens_unshared / lm.tokens_computed, np.abs(after - before).max()
    print(
        f"{source.path.name} {name}: {len(items)} items, {ratio:.2f}x fewer tokens, largest difference {largest:.1e}, "
        f"{len(changed)} ties, GPU {lm.gpu_seconds} s"
    )


@pytest.mark.parametrize(("name", "shots"), [("arc_easy", 0), ("mmlu_astronomy", 5)])
def test_integers_give_the_same_when_nothing_else_rounds(quantized, data, name, shots):
    """A token's integers do not depend on what stands beside it; only attention's sums do, and a sum whose last bit
    differs can move an activation by one step of its grid. Everything around the integers in float64, no step is
    seen."""
    model, tokenizer = quantized
    requests = requests_of(name, shots, 2 if shots else 6, *data)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda _, inputs, output: output.double()) for layer in layers]
    for parameter in [each for each in model.parameters() if each.dtype == torch.float32]:
        parameter.data = parameter.data.double()
    try:
        found = HarnessModel(model, tokenizer, 8).loglikelihood(requests)
        expected = plain(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    finally:
        for parameter in [each for each in model.parameters() if each.dtype == torch.float64]:
            parameter.data = parameter.data.float()
        for hook in hooks:
            hook.remove()
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize(
    ("name", "shots", "limit", "least"),
    [("hellaswag_preprocessed", 0, 1200, 2.1), ("arc_easy", 0, None, 3.0), ("mmlu_astronomy", 5, None, 5.0)],
)
def test_tokens_that_are_not_computed_again(evaluation_data, data, monkeypatch, name, shots, limit, least):
    """The model's work left out. No arrangement computes fewer tokens than there are different beginnings, which for
    zero-shot HellaSwag, whose endings are long, are nearly half of all tokens."""
    source = resolve_model("testbed-28m", path=str(evaluation_data / "models/testbed-28m"))
    lm = HarnessModel(load_model(source), load_tokenizer(source), 8)
    computed = []

    def count(model, rows, targets, device, dtype):
        computed.append(sum(map(len, rows)))
        return [(index, 0.0, False) for row in rows for index, _ in row.members]

    monkeypatch.setattr(adapter, "score", count)
    requests = requests_of(name, shots, limit, *data)
    lm.loglikelihood(requests)
    assert lm.tokens_unshared >= least * lm.tokens_computed
    assert sum(computed) <= lm.tokens_computed <= 1.15 * sum(computed)
    if not shots:
        read = [np.concatenate([front, back[:-1]]) for _, front, back in lm._encoded([each.args for each in requests])]
        different = len({each[: end + 1].tobytes() for each in read for end in range(len(each))})
        assert different <= sum(computed) <= 1.1 * different


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32, weight_std=0.3)
    source = resolve_model("local", path=str(directory))
    return load_model(source), load_tokenizer(source)


def _instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_odd_requests(small):
    """An empty context, blanks at a context's end, the same request twice, prompts longer than the model."""
    model, tokenizer = small
    requests = _instances(
        "loglikelihood",
        ("", "alpha"), ("gamma  ", "delta"), ("gamma", "delta"), ("gamma", "delta"),
        ("epsilon " * 60, "zeta"), ("epsilon " * 60, "eta"), ("x", "y"),
    )  # fmt: skip
    lm = HarnessModel(model, tokenizer, 2)
    found = lm.loglikelihood(requests)
    expected = plain(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert lm.truncated == 2


@pytest.mark.parametrize("bos", [False, True])
def test_strings_that_begin_with_the_prefix_token_and_blank_contexts(small, bos):
    """The prefix token is config.json's BOS here, whose text is a quotation mark. lm-eval adds no BOS to a string that
    begins with one; a context of blanks has no token but a BOS."""
    model, _ = small
    tokenizer = byte_tokenizer(bos)
    pairs = [("", '"alpha'), ('"gamma', " delta"), ('"gamma ', '"delta'), ("epsilon", '"zeta')]
    requests = _instances("loglikelihood", *pairs, *([("  ", "eta")] if bos else []))
    lm = HarnessModel(model, tokenizer, 2)
    assert tokenizer.decode(lm.prefix_token_id) == '"'
    found = lm.loglikelihood(requests)
    expected = plain(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_rolling_likelihoods(small):
    model, tokenizer = small
    requests = _instances("loglikelihood_rolling", ("one two three " * 40,), ("four",))
    found = HarnessModel(model, tokenizer, 2).loglikelihood_rolling(requests)
    assert found == pytest.approx(plain(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)


def test_a_short_sliding_window_leaves_the_model_its_own_mask(small, monkeypatch):
    model, tokenizer = small
    requests = _instances("loglikelihood", ("a context of some length", " one"), ("a context of some length", " two"))
    lm = HarnessModel(model, tokenizer, 2)
    expected = lm.loglikelihood(requests)
    shared = lm.tokens_computed
    monkeypatch.setattr(model.config, "sliding_window", 8, raising=False)
    monkeypatch.setattr(adapter, "score", None)
    lm.start("again", Progress.silent())
    assert [value for value, _ in lm.loglikelihood(requests)] == pytest.approx([value for value, _ in expected])
    assert lm.tokens_computed >= lm.tokens_unshared > shared


def test_a_request_that_cannot_be_scored(small):
    lm = HarnessModel(*small, 2)
    with pytest.raises(ValueError, match="a continuation of 0 tokens after 1"):
        lm._loglikelihood_tokens([(("a", ""), [5], [])])
    with pytest.raises(UnsupportedError, match="an answer of 257 tokens cannot be scored by a model of 256 positions"):
        lm._loglikelihood_tokens([(("a", "b"), [5], [7] * 257)])


def test_rows_are_reported_as_they_are_finished(small):
    advanced = []

    class Task:
        def advance(self, steps=1):
            advanced.append(steps)

    class Bars(Progress):
        def task(self, title, total):
            import contextlib

            assert (title, total) == ("lm-eval piqa", 3)
            return contextlib.nullcontext(Task())

    lm = HarnessModel(*small, 2)
    lm.start("piqa", Bars())
    lm.loglikelihood(_instances("loglikelihood", ("a", "b"), ("a", "c"), ("d", "e")))
    assert advanced == [1, 1, 1]
    assert lm.gpu_seconds is None
    assert pack([], []) == []
