"""The embedded model: its text, the training that made it, and the committed checkpoint."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from odyssey.models.embedded import TINY_PATH, evaluation_text, text_sha256, training_text
from odyssey.models.embedded import text as embedded_text
from odyssey.models.embedded.docstrings import module_docstrings, stdlib_docstrings
from odyssey.models.embedded.tokenizer import train_tokenizer
from odyssey.models.embedded.train import main
from odyssey.models.embedded.trainer import (
    Hyperparameters,
    build_model,
    mean_loss,
    residual_dropout,
    train,
    training_batches,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = Hyperparameters(
    vocab_size=384,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    window=64,
    batch_size=4,
    max_steps=20,
    warmup_steps=2,
    learning_rate=5e-3,
    evaluate_every=10,
    threads=1,
)


@pytest.fixture(scope="module")
def small_corpus():
    """Tokenizer, two documents of ids, validation ids: real text, enough to learn frequencies from."""
    texts = list(embedded_text.python_topics()["fit"].values())
    text = "\n\n".join(texts)
    tokenizer = train_tokenizer(text[:60_000], SMALL.vocab_size, SMALL.max_position_embeddings)
    ids = tokenizer(text[:30_000], verbose=False).input_ids
    return tokenizer, [ids[:4000], ids[4000:8000]], ids[8000:]


@pytest.fixture(scope="module")
def report():
    return json.loads((TINY_PATH / "training_report.json").read_text())


@pytest.fixture(scope="module")
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    return tokenizer, AutoModelForCausalLM.from_pretrained(TINY_PATH, dtype=torch.float32).eval()


def perplexity_float64(model, ids, window):
    """Perplexity over full windows, log-softmax in float64 NumPy."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        chunk = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(input_ids=chunk).logits[0, :-1].double().numpy()
        top = logits.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        losses.append(np.mean(log_sum - logits[np.arange(window - 1), chunk[0, 1:].numpy()]))
    return math.exp(np.mean(losses))


# --- text ---------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, odyssey.models; before = 'torch' in sys.modules\n"
        "import odyssey.models.embedded as e; e.training_text()\n"
        "sys.exit(('torch' in sys.modules) != before)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_text_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from odyssey.models.embedded import evaluation_text, text_sha256, training_text\n"
        "print(text_sha256(training_text()), text_sha256(evaluation_text()))"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [text_sha256(training_text()), text_sha256(evaluation_text())]


def test_evaluation_is_a_tenth_to_a_sixth_of_the_text():
    evaluation, training = len(evaluation_text()), len(training_text())
    assert 0.10 < evaluation / (evaluation + training) < 0.16


def test_parts_share_no_topic_and_no_long_paragraph():
    parts = embedded_text.python_topics()
    names = [name for part in parts.values() for name in part]
    assert len(names) == len(set(names))
    assert set(parts) == {"evaluation", "validation", "fit"}
    assert all(len(part) >= 3 for part in parts.values())
    paragraphs = []
    for part in parts.values():
        collapsed = {" ".join(p.split()) for text in part.values() for p in text.split("\n\n")}
        paragraphs.append({p for p in collapsed if len(p) >= 40})
    for i, left in enumerate(paragraphs):
        for right in paragraphs[:i]:
            assert not left & right


def test_training_text_is_fit_and_validation_topics():
    parts = embedded_text.python_topics()
    texts = {**parts["fit"], **parts["validation"]}
    assert training_text().split() == " ".join(texts[name] for name in sorted(texts)).split()


def test_split_does_not_depend_on_the_order_of_the_topics():
    from pydoc_data.topics import topics

    reversed_topics = dict(reversed(topics.items()))
    assert embedded_text.split_topics(reversed_topics) == embedded_text.split_topics(topics)


def test_topic_keeps_its_part_when_other_topics_change():
    alone = embedded_text.split_topics({"strings": "Strings are text.\n"})
    part = embedded_text.topic_part("strings")
    assert alone[part] == {"strings": "Strings are text."}
    assert "strings" in embedded_text.python_topics()[part]


def test_repeated_paragraph_stays_in_the_evaluation_part_only():
    by_part = {}
    for i in range(200):
        by_part.setdefault(embedded_text.topic_part(f"topic{i}"), f"topic{i}")
    shared = "A paragraph that is certainly longer than forty characters, wrapped\nin one way."
    rewrapped = "   A paragraph that is certainly longer than forty\n   characters, wrapped in one way."
    split = embedded_text.split_topics(
        {
            by_part["fit"]: f"{shared}\n\nshort\n\nOnly here.",
            by_part["validation"]: f"{shared}\n\nshort",
            by_part["evaluation"]: f"{rewrapped}\n\nshort",
        }
    )
    assert split["evaluation"] == {by_part["evaluation"]: f"{rewrapped}\n\nshort"}
    assert split["validation"] == {by_part["validation"]: "short"}
    assert split["fit"] == {by_part["fit"]: "short\n\nOnly here."}


def test_normalise():
    raw = "\n\n  Title  \n\tx = 1 \n\n\n\n\nend\r\n\n"
    expected = "  Title\n        x = 1\n\nend"
    assert embedded_text.normalise(raw) == expected
    assert embedded_text.normalise(expected) == expected


def test_stripped_python_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="pydoc_data"):
        evaluation_text()


def test_docstrings_of_a_module_in_order():
    source = (
        '"""Module."""\n'
        'def f():\n    """Function.\n\n    More.\n    """\n'
        'class C:\n    """Class."""\n    def g(self):\n        "Method."\n'
        'x = "no docstring"\n'
    )
    assert module_docstrings(source) == "Module.\n\nFunction.\n\nMore.\n\nClass.\n\nMethod."


def test_docstrings_leave_out_tests_repetitions_and_what_is_held_out(tmp_path, monkeypatch):
    held_out = "This paragraph is held out and longer than\nforty characters."
    own = "This paragraph is a docstring of two modules, and long."
    (tmp_path / "b").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "a.py").write_text(f'"""Head.\n\n    {held_out}\n\n{own}\n"""\n')
    (tmp_path / "b" / "c.py").write_text(f'def f():\n    """{own}\n\n    Tail."""\n')
    (tmp_path / "broken.py").write_text('"""Broken."""\ndef\n')
    (tmp_path / "latin.py").write_bytes(b'"""\xe4"""\n')
    (tmp_path / "plain.py").write_text("x = 1\n")
    (tmp_path / "test" / "d.py").write_text('"""A test."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert stdlib_docstrings([held_out]) == {"a.py": f"Head.\n\n{own}", "b/c.py": "Tail."}
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    with pytest.raises(RuntimeError, match="complete CPython"):
        stdlib_docstrings([])


# --- training -----------------------------------------------------------------------------------------------


def test_twenty_steps_lower_the_loss_and_repeat_exactly(small_corpus):
    tokenizer, documents, validation = small_corpus
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model(SMALL, tokenizer)
        before = mean_loss(model, validation, SMALL.window)
        result = train(model, documents, [], validation, SMALL)
        results.append((result.best_validation_loss, mean_loss(model, validation, SMALL.window)))
    assert before == pytest.approx(math.log(SMALL.vocab_size), rel=0.05)
    assert results[0][0] < before - 0.5
    assert results[0][0] == results[0][1]
    assert results[0] == results[1]
    assert [entry["step"] for entry in result.history] == [10, 20]
    assert not model.model.embed_tokens._forward_hooks


def test_training_stops_early_and_keeps_the_best(small_corpus):
    tokenizer, documents, validation = small_corpus
    hp = Hyperparameters(**{**SMALL.__dict__, "learning_rate": 0.0, "evaluate_every": 2, "patience": 3})
    torch.manual_seed(0)
    model = build_model(hp, tokenizer)
    before = mean_loss(model, validation, hp.window)
    result = train(model, documents, [], validation, hp)
    assert (result.best_step, result.steps) == (2, 8)
    assert result.best_validation_loss == before


def test_diverged_training_is_reported(small_corpus):
    tokenizer, documents, validation = small_corpus
    model = build_model(SMALL, tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(model, documents, [], validation, SMALL)


def test_docstrings_give_way_to_topics():
    shares = {"docstring_share": 1.0, "final_docstring_share": 0.2}
    hp = Hyperparameters(**{**SMALL.__dict__, "max_steps": 200, **shares})
    batches = list(training_batches([[0] * 500, [0] * 500], [[1] * 5000], hp))
    assert all(batch.shape == (hp.batch_size, hp.window) for batch in batches)
    measured = torch.stack([batch.float().mean() for batch in batches]).view(4, 50).mean(1)
    assert measured.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3], abs=0.1)


def test_batches_need_text():
    with pytest.raises(ValueError, match="window=64 needs at least 128"):
        next(training_batches([[0] * 100], [], SMALL))


def test_mean_loss_agrees_with_float64(small_corpus):
    tokenizer, _, validation = small_corpus
    model = build_model(SMALL, tokenizer).eval()
    expected = perplexity_float64(model, validation, 64)
    assert math.exp(mean_loss(model, validation, 64)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="longer than the text"):
        mean_loss(model, validation[:63], 64)


def test_residual_dropout_acts_in_training_only(small_corpus):
    tokenizer, _, validation = small_corpus
    model = build_model(SMALL, tokenizer).eval()
    batch = torch.tensor([validation[:64]])
    clean = model(input_ids=batch).logits
    with residual_dropout(model, 0.5):
        assert torch.equal(model(input_ids=batch).logits, clean)
        assert not torch.allclose(model.train()(input_ids=batch).logits, clean)
    assert torch.equal(model(input_ids=batch).logits, clean)


def test_command_writes_a_loadable_checkpoint(tmp_path):
    out = tmp_path / "model"
    fields = {**SMALL.__dict__, "max_steps": 2, "vocab_size": 512}
    main(["--out", str(out), *(f"--{name.replace('_', '-')}={value}" for name, value in fields.items())])
    written = json.loads((out / "training_report.json").read_text())
    assert written["hyperparameters"] == fields
    assert written["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(out)(evaluation_text(), verbose=False).input_ids
    reported = written["losses_nats_per_token"]["evaluation"]
    assert mean_loss(model, ids, 64) == pytest.approx(reported, rel=1e-4)
    with pytest.raises(SystemExit):
        main(["--out", str(out)])


# --- the committed checkpoint -------------------------------------------------------------------------------


def test_layout_and_size():
    names = {path.name for path in TINY_PATH.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_report.json",
    }
    assert sum(path.stat().st_size for path in TINY_PATH.iterdir()) <= 10_000_000


def test_every_gemm_dimension_is_a_multiple_of_128():
    config = AutoConfig.from_pretrained(TINY_PATH)
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 512
    assert config.tie_word_embeddings
    with safe_open(TINY_PATH / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    matrices = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.ndim == 2}
    assert len(matrices) == 1 + 7 * config.num_hidden_layers
    assert all(size % 128 == 0 for shape in matrices.values() for size in shape), matrices


def test_tokenizer_round_trip_and_bos(tiny):
    tokenizer, model = tiny
    assert len(tokenizer) == model.config.vocab_size
    for text in (evaluation_text(), "naïve 日本語 \U0001f600\n\n\t  x = 1\r\n", "", "</s"):
        ids = tokenizer(text, verbose=False).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id is not None


def test_perplexity_is_far_below_the_baselines(tiny, report):
    tokenizer, model = tiny
    window = report["hyperparameters"]["window"]
    ids = tokenizer(evaluation_text(), verbose=False).input_ids
    perplexity = perplexity_float64(model, ids, window)

    counts = Counter(tokenizer(training_text(), verbose=False).input_ids)
    total = sum(counts.values()) + len(tokenizer)
    unigram = math.exp(-np.mean([math.log((counts[token] + 1) / total) for token in ids[1:]]))
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    assert perplexity < unigram / 5
    assert perplexity < perplexity_float64(untrained, ids[: 8 * window], window) / 20

    if text_sha256(evaluation_text()) == report["evaluation_text_sha256"]:
        assert perplexity == pytest.approx(report["perplexities"]["evaluation"], rel=1e-3)


def test_greedy_generation_is_text_it_has_learnt(tiny):
    tokenizer, model = tiny
    prompt = tokenizer('The "with" statement is used to', return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    words = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True).split()
    assert len(words) >= 4
    known = set(training_text().split())
    assert sum(word in known for word in words) >= len(words) - 2


def test_report_tells_how_the_checkpoint_was_made(report):
    parameters = AutoModelForCausalLM.from_pretrained(TINY_PATH).num_parameters()
    assert report["parameters"] == parameters
    assert report["hyperparameters"] == Hyperparameters().__dict__
    assert len(report["commit"]) == 40
    assert report["best_step"] <= report["steps"] <= report["hyperparameters"]["max_steps"]
    best = min(report["history"], key=lambda entry: entry["validation_loss"])
    assert best["step"] == report["best_step"]
    # Rounding the weights to fp16 moves the loss a little, not more.
    assert report["losses_nats_per_token"]["validation"] == pytest.approx(best["validation_loss"], rel=1e-3)
