"""data.root in the layout of the hub's own cache: the same prompts as from the official files."""

from __future__ import annotations

import gzip
import json

import pytest

from odyssey.data.hub import find_snapshot
from odyssey.data.task_files import task_source
from odyssey.data.texts import C4_VALIDATION, load_corpus, wikitext_rows

REVISION = "0123456789abcdef0123456789abcdef01234567"


def _snapshot(root, repository, configs, main=REVISION):
    """configs: config -> split -> rows; None for a repository without configs. Data files as links to blobs."""
    folder = root / f"datasets--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(main)
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config or 'default'}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config or 'data'}/{split}.jsonl"
            blob = folder / "blobs" / name.replace("/", "-")
            blob.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).symlink_to(blob)
            lines += [f"  - split: {split}", f"    path: {name}"]
    (snapshot / "README.md").write_text("\n".join([*lines, "---", ""]))
    return snapshot


def _rows(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _prompts(name, root, cache, limit=5):
    from lm_eval.tasks import TaskManager

    source = task_source(name, str(root), cache)
    manager = TaskManager(include_path=list(source.include_paths), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return source, len(task.eval_docs), [instance.args for instance in task.instances]


@pytest.mark.parametrize("inside", [".", "hub"])
def test_tasks_have_the_prompts_of_the_official_files(evaluation_data, tmp_path, inside):
    data, root = evaluation_data / "data", tmp_path / "home"
    (root / inside).mkdir(parents=True)
    labels = (data / "piqa/valid-labels.lst").read_text().split()
    piqa = [{**row, "label": int(label)} for row, label in zip(_rows(data / "piqa/valid.jsonl"), labels, strict=True)]
    winogrande = _rows(data / "winogrande/winogrande_xl_validation.jsonl")
    mmlu = {
        split: [row for row in _rows(data / f"mmlu/mmlu_{split}.jsonl") if row["subject"] == "astronomy"]
        for split in ("test", "dev")
    }
    # lm-eval's definitions name the training split, too.
    _snapshot(root / inside, "baber/piqa", {None: {"train": piqa[:3], "validation": piqa}})
    _snapshot(
        root / inside, "allenai/winogrande", {"winogrande_xl": {"train": winogrande[:3], "validation": winogrande}}
    )
    _snapshot(root / inside, "cais/mmlu", {"astronomy": mmlu, "virology": mmlu})
    for name, count in (("piqa", 1838), ("winogrande", 1267), ("mmlu_astronomy", 152)):
        source, rows, prompts = _prompts(name, root, tmp_path / "cache")
        _, _, expected = _prompts(name, data, tmp_path / "official")
        assert source.origin.startswith("hub cache:")
        assert source.origin.endswith(f"@{REVISION[:12]}")
        assert len(source.data_sha256) == 64
        assert (rows, prompts) == (count, expected)


def test_official_files_win_and_changed_data_are_seen(evaluation_data, tmp_path):
    rows = _rows(evaluation_data / "data/lambada/lambada_test.jsonl")
    snapshot = _snapshot(tmp_path, "EleutherAI/lambada_openai", {"default": {"test": rows}})
    before = task_source("lambada_openai", str(tmp_path), tmp_path / "cache")
    assert before.origin.startswith("hub cache:EleutherAI/lambada_openai@")
    with (snapshot / "default/test.jsonl").open("a") as lines:
        lines.write('{"text": "one more"}\n')
    after = task_source("lambada_openai", str(tmp_path), tmp_path / "cache")
    assert after.data_sha256 != before.data_sha256
    assert after.include_paths != before.include_paths
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada/lambada_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert task_source("lambada_openai", str(tmp_path), tmp_path / "cache").origin == "lambada_test.jsonl"


def test_texts(evaluation_data, tmp_path):
    rows = wikitext_rows((evaluation_data / "data/wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
    splits = {"train": [{"text": "a"}], "test": [{"text": row} for row in rows]}
    _snapshot(tmp_path, "Salesforce/wikitext", {"wikitext-2-raw-v1": splits})
    corpus = load_corpus("wikitext2", "test", root=str(tmp_path))
    assert corpus.documents == rows
    assert corpus.origin == f"hub cache:Salesforce/wikitext@{REVISION[:12]}"
    snapshot = _snapshot(tmp_path, "allenai/c4", {})
    (snapshot / "en").mkdir()
    with gzip.open(snapshot / C4_VALIDATION, "wt") as lines:
        lines.write('{"text": "one"}\n')
    assert load_corpus("c4", "test", root=str(tmp_path)).documents == ["one"]


def test_the_revision_that_main_names(tmp_path):
    snapshot = _snapshot(tmp_path, "baber/piqa", {})
    other = snapshot.with_name("f" * 40)
    other.mkdir()
    assert find_snapshot(tmp_path, "piqa").path == snapshot
    (tmp_path / "datasets--baber--piqa/refs/main").write_text("f" * 40 + "\n")
    assert find_snapshot(tmp_path, "piqa").path == other
    assert find_snapshot(tmp_path, "winogrande") is None
    assert find_snapshot(None, "piqa") is None
    assert find_snapshot(tmp_path, "gsm8k") is None
