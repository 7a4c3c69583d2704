"""Our lm-eval adapter against lm-eval's own, item by item, on a model with integer layers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import write_checkpoint

from odyssey.data.task_files import task_source
from odyssey.data.task_names import task_folder
from odyssey.errors import UnsupportedError
from odyssey.methods import build_method, settings_class
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.source import resolve_model
from odyssey.quantization.checkpoint import load_quantized
from odyssey.quantization.linear import QuantizedLinear
from odyssey.quantization.pipeline import quantize_checkpoint

BATCH_SIZE = 4


@pytest.fixture(scope="module")
def quantized(evaluation_data, tmp_path_factory):
    """testbed-28m with 4-bit weights and 8-bit activations, as the cell loads it."""
    source = resolve_model("local", hub_id=None, path=str(evaluation_data / "models/testbed-28m"), revision="main")
    method = build_method("rtn", settings_class("rtn")())
    directory = tmp_path_factory.mktemp("rtn")
    quantize_checkpoint(source, method, {}, None, directory, device=torch.device("cpu"), seed=0)
    model = load_quantized(directory)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    return model, load_tokenizer(source)


def _plain_lm_eval(model, tokenizer, name, limit, num_fewshot, monkeypatch) -> dict:
    """simple_evaluate with HFLM and lm-eval's own definition, whose data come from `hub`."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # seconds of pip and compiler versions
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    return lm_eval.evaluator.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE), tasks=[name], limit=limit,
        num_fewshot=num_fewshot, bootstrap_iters=1000,
        task_manager=TaskManager(include_path=[task_folder(name)], include_defaults=False),
    )  # fmt: skip


def _expected_answer(sample: dict, metric: str) -> int:
    """By lm-eval's responses: the likeliest choice, per character for acc_norm; for LAMBADA whether it is right."""
    values = [value for value, _ in sample["filtered_resps"]]
    if len(values) == 1:
        return int(sample["acc"])
    if metric == "acc_norm":
        # The continuation is the choice behind a space.
        values = [value / (len(text) - 1) for value, (_, text) in zip(values, sample["arguments"], strict=True)]
    return max(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize(
    ("name", "metric", "limit"),
    [
        ("lambada_openai", "acc", 8), ("piqa", "acc_norm", 8), ("arc_easy", "acc_norm", 8), ("winogrande", "acc", 8),
        ("mmlu_astronomy", "acc", 3),
    ],
)  # fmt: skip
def test_every_item_is_scored_as_lm_eval_scores_it(
    quantized, evaluation_data, hub, monkeypatch, tmp_path, name, metric, limit
):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    model, tokenizer = quantized
    source = task_source(name, str(evaluation_data / "data"), tmp_path)
    result, items = evaluate_task(HarnessModel(model, tokenizer, BATCH_SIZE), source, num_fewshot=None, limit=limit)
    shots = 5 if name.startswith("mmlu") else 0
    expected = _plain_lm_eval(model, tokenizer, name, limit, shots or None, monkeypatch)

    samples = {str(sample["doc_id"]): sample for sample in expected["samples"][name]}
    assert list(items) == [name]
    assert items[name].keys() == samples.keys() == {str(index) for index in range(limit)}
    for doc_id, sample in samples.items():
        # LAMBADA's perplexity is no choice but a log-likelihood: what the integers let through of attention's rounding.
        assert {key: items[name][doc_id][key] for key in sample["metrics"]} == {
            key: pytest.approx(float(sample[key]), abs=0.1 if key == "perplexity" else 0) for key in sample["metrics"]
        }
        assert items[name][doc_id]["answer"] == _expected_answer(sample, metric)
    assert result["metric"] == metric
    for key, values in result["metrics"].items():
        tolerance = 0.02 if key == "perplexity" else 0
        assert values["value"] == pytest.approx(expected["results"][name][f"{key},none"], rel=tolerance)
        assert values["stderr"] == pytest.approx(expected["results"][name][f"{key}_stderr,none"], rel=5 * tolerance)
    assert (result["value"], result["stderr"]) == tuple(result["metrics"][metric].values())
    assert result["version"] == expected["versions"][name]
    assert result["num_fewshot"] == shots
    assert (result["items"], result["requests"]) == (
        limit,
        sum(len(sample["arguments"]) for sample in samples.values()),
    )

    # The hub's rows give the very same prompts as the local files.
    from_hub, hub_items = evaluate_task(
        HarnessModel(model, tokenizer, BATCH_SIZE), task_source(name, None, tmp_path), num_fewshot=None, limit=limit
    )
    assert from_hub["origin"] == "hub"
    assert from_hub["prompts_sha256"] == result["prompts_sha256"]
    assert hub_items == items


@pytest.mark.parametrize(
    ("name", "count", "rows"),
    [("mmlu_stem", 19, 3153), pytest.param("mmlu", 57, 14042, marks=pytest.mark.slow)],
)
def test_a_group_is_weighted_by_its_subjects_sizes(quantized, evaluation_data, tmp_path, name, count, rows):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    source = task_source(name, str(evaluation_data / "data"), tmp_path)
    result, items = evaluate_task(HarnessModel(*quantized, 8), source, num_fewshot=0, limit=1)
    subjects = result["subtasks"]
    assert len(subjects) == count
    assert items.keys() == subjects.keys()
    mean = sum(subject["value"] * subject["items"] for subject in subjects.values()) / result["items"]
    assert result["value"] == pytest.approx(mean, abs=1e-12)
    assert (result["items"], result["num_fewshot"], result["items_in_split"]) == (count, 0, rows)


@pytest.fixture
def small_model(tmp_path):
    source = resolve_model("local", hub_id=None, path=str(write_checkpoint(tmp_path / "model")), revision="main")
    return load_model(source), load_tokenizer(source)


def test_progress_and_prompts_that_do_not_fit(small_model, small_root, tmp_path):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    texts = small_root / "lambada/lambada_test.jsonl"
    lines = texts.read_text().splitlines()
    lines[1] = '{"text": "' + "word " * 80 + 'end"}'  # 402 bytes are 402 tokens; the model takes 256
    texts.write_text("\n".join(lines) + "\n")
    advanced = []

    class Task:
        def advance(self, steps=1):
            advanced.append(steps)

    class Progress:
        def task(self, title, total):
            assert (title, total) == ("lm-eval lambada_openai", 3)
            return contextlib.nullcontext(Task())

    source = task_source("lambada_openai", str(small_root), tmp_path / "cache")
    result, _ = evaluate_task(HarnessModel(*small_model, 2), source, num_fewshot=None, limit=3, progress=Progress())
    assert sum(advanced) == 3
    assert result["truncated_requests"] == 1
    assert result["requests"] == 3


def test_nan_likelihoods_are_an_error(small_model, small_root, tmp_path):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    model, tokenizer = small_model
    model.model.norm.weight.data[0] = float("nan")
    source = task_source("piqa", str(small_root), tmp_path / "cache")
    with pytest.raises(ValueError, match="piqa: the model's log-likelihood of document 0 is not finite"):
        evaluate_task(HarnessModel(model, tokenizer, 2), source, num_fewshot=None, limit=2)


def test_few_shot_examples_never_come_from_the_evaluated_items(small_model, small_root, tmp_path):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    source = task_source("piqa", str(small_root), tmp_path / "cache")
    with pytest.raises(UnsupportedError, match="piqa: accuracy.num_fewshot=3 needs examples from another split"):
        evaluate_task(HarnessModel(*small_model, 2), source, num_fewshot=3, limit=2)


def test_a_task_that_fixes_zero_shot_keeps_it(small_model, small_root, tmp_path, monkeypatch):
    from odyssey.accuracy import harness
    from odyssey.accuracy.adapter import HarnessModel

    source = task_source("piqa", str(small_root), tmp_path / "cache")
    expected, _ = harness.evaluate_task(HarnessModel(*small_model, 2), source, num_fewshot=None, limit=2)
    load = harness._load

    def zero_shot(source):
        loaded = load(source)
        loaded["tasks"]["piqa"].set_config(key="num_fewshot", value=0)
        return loaded

    monkeypatch.setattr(harness, "_load", zero_shot)
    asked = replace(source, has_fewshot=True)
    found, _ = harness.evaluate_task(HarnessModel(*small_model, 2), asked, num_fewshot=2, limit=2)
    assert (found["num_fewshot"], found["prompts_sha256"]) == (0, expected["prompts_sha256"])


def test_the_hash_of_the_prompts_is_that_of_their_text(small_model, small_root, tmp_path):
    from odyssey.accuracy.adapter import HarnessModel
    from odyssey.accuracy.harness import evaluate_task

    file, hashes = small_root / "piqa/valid.jsonl", []
    for old, new in (("", ""), ("Say 1.", "Say 1!"), ("Say 1!", "Say 1.")):
        file.write_text(file.read_text().replace(old, new, 1))
        source = task_source("piqa", str(small_root), tmp_path / "cache")
        result, _ = evaluate_task(HarnessModel(*small_model, 2), source, num_fewshot=None, limit=2)
        hashes.append(result["prompts_sha256"])
    assert hashes[0] == hashes[2] != hashes[1]


def test_the_callers_tokenizer_is_left_alone(small_model):
    from odyssey.accuracy.adapter import HarnessModel

    model, tokenizer = small_model
    before = (len(tokenizer), tokenizer.pad_token)
    assert HarnessModel(model, tokenizer, 2).tokenizer.pad_token is not None
    assert (len(tokenizer), tokenizer.pad_token) == before


def test_perplexity_does_not_import_lm_eval():
    code = (
        "import sys, odyssey.cell, odyssey.runner, odyssey.accuracy.perplexity, odyssey.data.task_names as names;"
        "assert names.is_known_task('mmlu_astronomy');"
        "assert 'lm_eval' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_names_are_those_of_lm_evals_index():
    from lm_eval.tasks import TaskManager

    from odyssey.data.task_names import is_known_task

    index = TaskManager()
    known = [*index.all_subtasks, *index.all_groups]
    assert len(known) > 10_000
    assert [name for name in known if not is_known_task(name)] == []
    assert [name for name in index.all_tags if is_known_task(name)] == []
