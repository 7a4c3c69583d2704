"""Tasks from local files, what is kept when data are missing or a run is stopped, and what a config may say."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.cells import cell_config
from helpers.checkpoints import write_checkpoint

from odyssey.accuracy import tasks
from odyssey.accuracy.items import read_items
from odyssey.accuracy.tasks import evaluate_tasks, remove_saved
from odyssey.cell import Cell
from odyssey.config import (
    AccuracyConfig,
    DataConfig,
    LatencyConfig,
    register_schemas,
)
from odyssey.data.task_files import task_source
from odyssey.errors import ConfigError, MissingDataError
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.source import resolve_model
from odyssey.overrides import check_command_line


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lambada_openai", 5153), ("piqa", 1838), ("winogrande", 1267), ("arc_easy", 2376),
        ("hellaswag_preprocessed", 10042),
    ],
)  # fmt: skip
def test_lm_eval_sees_all_official_rows(evaluation_data, tmp_path, name, count):
    from lm_eval.tasks import TaskManager

    source = task_source(name, str(evaluation_data / "data"), tmp_path)
    manager = TaskManager(include_path=list(source.include_paths), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    assert len(task.eval_docs) == count
    assert {task.doc_to_target(doc) for doc in list(task.eval_docs)[:40]} != {None}


def test_mmlu_is_cut_into_its_subjects(evaluation_data, tmp_path):
    root = evaluation_data / "data"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    (_, folder) = task_source("mmlu", str(root), tmp_path).include_paths
    counts = {
        split: [len(file.read_text().splitlines()) for file in sorted(folder.glob(f"*.{split}.jsonl"))]
        for split in ("test_split", "fewshot_split")
    }
    assert (len(counts["test_split"]), sum(counts["test_split"])) == (57, 14042)
    assert counts["fewshot_split"] == [5] * 57
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    # The same content is converted once.
    changed = folder.stat().st_mtime_ns
    assert task_source("mmlu_astronomy", str(root), tmp_path).include_paths[1] == folder
    assert folder.stat().st_mtime_ns == changed


def test_the_original_hellaswag_file_is_the_standard_task(tmp_path):
    from lm_eval.tasks import TaskManager

    row = {"ind": 1, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "", "label": 2,
           "endings": ["falls. [step] He", "sings", "works", "leaves"]}  # fmt: skip
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/hellaswag_val.jsonl").write_text((json.dumps(row) + "\n") * 10042)
    source = task_source("hellaswag", str(tmp_path), tmp_path / "cache")
    task = TaskManager(include_path=list(source.include_paths), include_defaults=False).load(["hellaswag"])["tasks"][
        "hellaswag"
    ]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == "Roof: A man sits. He"
    assert task.doc_to_choice(doc)[0] == "falls. He"
    assert (len(task.eval_docs), int(task.doc_to_target(doc))) == (10042, 2)


def _break(root, how):
    texts, labels = root / "lambada/lambada_test.jsonl", root / "piqa/valid-labels.lst"
    lines = texts.read_text().splitlines(keepends=True)
    if how == "short":
        texts.write_text("".join(lines[:-1]))
    elif how == "column":
        texts.write_text("".join([*lines[:2], '{"txt": "a b"}\n', *lines[3:]]))
    elif how == "json":
        texts.write_text("".join([*lines[:4], '{"text": "a', *lines[5:]]))
    else:
        labels.write_text("1\n0\n")


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("lambada_openai", "short", "lambada_test.jsonl: has 5152 rows, the official split has 5153"),
        ("lambada_openai", "column", "lambada_test.jsonl: line 3 is not a JSON object with text"),
        ("lambada_openai", "json", "lambada_test.jsonl: line 5 is not a JSON object"),
        ("piqa", "labels", "valid-labels.lst: needs 1838 lines of 0 or 1, one for each row of valid.jsonl"),
    ],
)
def test_damaged_files_are_missing_data(small_root, tmp_path, name, how, message):
    _break(small_root, how)
    with pytest.raises(MissingDataError, match=message) as caught:
        task_source(name, str(small_root), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_local_only_variant_needs_its_file(tmp_path):
    with pytest.raises(
        MissingDataError, match="hellaswag_preprocessed: exists as a local file only; put a copy at DIR"
    ):
        task_source("hellaswag_preprocessed", None, tmp_path)


@pytest.fixture
def evaluate(tmp_path, small_root):
    """evaluate(tasks, **identity) -> (results, error) on a small random model, into one cell directory."""
    source = resolve_model("local", hub_id=None, path=str(write_checkpoint(tmp_path / "model")), revision="main")
    model, tokenizer = load_model(source), load_tokenizer(source)

    def call(names, model_name="m", **settings):
        results: dict = {}
        error = None
        try:
            evaluate_tasks(
                model, tokenizer, AccuracyConfig(tasks=names, limit=4, **settings), results,
                directory=tmp_path / "cell", cache=tmp_path / "cache", data_root=str(small_root),
                identity={"model": model_name},
            )  # fmt: skip
        except MissingDataError as caught:
            error = str(caught)
        return results, error

    return call


def test_a_saved_result_is_of_all_that_it_depends_on(small_root, tmp_path):
    group = AccuracyConfig(tasks=["piqa", "lambada_openai"], limit=4, num_fewshot=0, batch_size=2, batch_tokens=512)
    sources = [task_source(name, str(small_root), tmp_path) for name in group.tasks]
    (small_root / "piqa/valid-labels.lst").write_text("1\n" * 1838)
    sources.append(task_source("piqa", str(small_root), tmp_path))
    changes = [{}, {"limit": 5}, {"num_fewshot": 1}, {"batch_size": 3}, {"batch_tokens": 513}]
    groups = [dataclasses.replace(group, **change) for change in changes]
    identities = [tasks._task_identity(sources[0], each) for each in groups]
    identities += [tasks._task_identity(each, group) for each in sources[1:]]
    assert all(identities.count(each) == 1 for each in identities)


def test_a_missing_task_costs_no_other_task(evaluate, no_hub, small_root, tmp_path):
    results, error = evaluate(["winogrande", "piqa", "arc_easy", "lambada_openai"], simulate=True)
    assert list(results) == ["piqa", "lambada_openai"]
    assert all(result["items"] == 4 and result["simulated"] for result in results.values())
    winogrande, arc_easy = error.split("; arc_easy: ")
    assert winogrande.startswith("winogrande: its data cannot be read (ConnectionError")
    fetch = "or fetch it where the hub answers: python -m odyssey.data fetch --tasks"
    copy = f"put a copy at {small_root}/winogrande/winogrande_xl_validation.jsonl"
    assert winogrande.endswith(f"{copy}, {fetch} winogrande --to {small_root}")
    copy = f"put a copy at {small_root}/arc/ARC-Easy_test.jsonl"
    assert arc_easy.endswith(f"{copy}, {fetch} arc_easy --to {small_root}")
    assert "\n" not in error
    items = read_items(tmp_path / "cell", results["piqa"])
    assert list(items["piqa"]) == ["0", "1", "2", "3"]
    assert sum(item["acc"] for item in items["piqa"].values()) / 4 == results["piqa"]["metrics"]["acc"]["value"]


def test_a_stopped_run_takes_up_the_finished_tasks(evaluate, monkeypatch):
    from odyssey.accuracy import harness

    whole, _ = evaluate(["piqa", "lambada_openai"], model_name="other")
    evaluated, evaluate_task = [], harness.evaluate_task

    def stop_at_lambada(lm, source, **settings):
        evaluated.append(source.name)
        if source.name == "lambada_openai" and len(evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate_task(lm, source, **settings)

    monkeypatch.setattr(harness, "evaluate_task", stop_at_lambada)
    with pytest.raises(KeyboardInterrupt):
        evaluate(["piqa", "lambada_openai"])
    results, _ = evaluate(["piqa", "lambada_openai"])
    assert evaluated == ["piqa", "lambada_openai", "lambada_openai"]
    assert results["piqa"]["resumed"]
    assert "resumed" not in results["lambada_openai"]
    for name, result in results.items():
        for key in ("value", "stderr", "prompts_sha256", "items_sha256"):
            assert result[key] == whole[name][key], (name, key)


def test_a_saved_result_is_taken_only_for_the_same_measurement(evaluate, tmp_path, small_root):
    first, _ = evaluate(["piqa"])
    assert evaluate(["piqa"])[0]["piqa"]["resumed"]
    assert "resumed" not in evaluate(["piqa"], model_name="other")[0]["piqa"]
    assert "resumed" not in evaluate(["piqa"])[0]["piqa"]
    assert "resumed" not in evaluate(["piqa"], batch_tokens=100)[0]["piqa"]
    evaluate(["piqa"])
    items = tmp_path / "cell" / first["piqa"]["items_file"]
    whole = items.read_bytes()
    items.write_bytes(whole[:-1])
    with pytest.raises(MissingDataError, match="not the per-item results of its record"):
        read_items(tmp_path / "cell", first["piqa"])
    assert "resumed" not in evaluate(["piqa"])[0]["piqa"]
    assert items.read_bytes() == whole
    labels = small_root / "piqa/valid-labels.lst"
    labels.write_text("1" + labels.read_text()[1:])
    assert "resumed" not in evaluate(["piqa"])[0]["piqa"]
    remove_saved(tmp_path / "cell")
    assert list((tmp_path / "cell" / tasks.FOLDER).iterdir()) == []


def test_a_cell_with_missing_data_keeps_everything_else(no_hub, small_root, tmp_path):
    config = cell_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        accuracy=AccuracyConfig(tasks=["hellaswag", "piqa"], limit=3, batch_size=2),
        latency=LatencyConfig(engine="transformers", input_len=8, output_len=2, repeats=1),
        data=DataConfig(root=str(small_root)),
    )
    record = Cell(config, {}, "digest", tmp_path / "cell").run()
    assert record["outcome"] == "missing-data"
    assert record["reason"].startswith("hellaswag: its data cannot be read")
    result = record["accuracy"]["tasks"]["piqa"]
    assert (result["items"], result["simulated"], result["batch_size"]) == (3, False, 2)
    assert record["latency"]["total_ms"]["samples"]
    assert record["timings"]["tasks_s"] > 0
    assert len(read_items(tmp_path / "cell", result)["piqa"]) == 3
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["accuracy.tasks=[pica]"], "accuracy.tasks: pica is no lm-eval task or group .*similar names: .*piqa"),
        (["accuracy.tasks=[ai2_arc]"], "accuracy.tasks: ai2_arc is no lm-eval task or group .of a tag, name the tasks"),
        (["accuracy.tasks=[piqa,piqa]"], "accuracy.tasks: piqa is named twice"),
        (["accuracy.tasks=piqa"], "accuracy.tasks=piqa: "),
        (["accuracy.limit=0"], "accuracy.limit=0: must be at least 1"),
        (["accuracy.limit=x"], "accuracy.limit=x: .*Integer"),
        (["accuracy.num_fewshot=-1"], "accuracy.num_fewshot=-1: must be at least 0"),
        (["accuracy.batch_size=0"], "accuracy.batch_size=0: must be at least 1"),
        (["accuracy.batch_tokens=0"], "accuracy.batch_tokens=0: must be at least 1"),
        (["accuracy.perplexity.also=[c5]"], "accuracy.perplexity.also=c5: allowed: wikitext2, c4, embedded"),
        (["accuracy.perplexity.also=[c4,c4]"], "accuracy.perplexity.also: c4 is named twice"),
        (["accuracy.perplexity.dataset=c4", "accuracy.perplexity.also=[c4]"], "also: c4 is named twice"),
        (["accuracy=lambda"], "accuracy=lambda: unknown; allowed: commonsense, lambada, mmlu, none, paper, perplexity"),
    ],
)
def test_what_a_config_may_not_say(project_root, arguments, message):
    register_schemas()
    with pytest.raises(ConfigError, match=message) as caught:
        check_command_line(arguments, project_root / "conf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["accuracy=paper", "accuracy.limit=10"],
        ["accuracy.perplexity.dataset=c4", "accuracy.perplexity.path=shard.jsonl", "accuracy.perplexity.seed=1"],
        ["-m", "accuracy=lambada,commonsense,mmlu"],
        ["accuracy.tasks=[mmlu_astronomy,mmlu_stem,gsm8k]", "accuracy.num_fewshot=2"],
        ["accuracy=none", "accuracy.tasks=[hellaswag_preprocessed]"],
    ],
)
def test_what_a_config_may_say(project_root, arguments):
    register_schemas()
    check_command_line(arguments, project_root / "conf")
