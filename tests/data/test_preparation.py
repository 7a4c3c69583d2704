"""Fetching from a hub in memory, resuming, and what `verify` finds in a directory."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from odyssey.data import preparation
from odyssey.data.__main__ import main
from odyssey.data.hub import HUB_DATASETS
from odyssey.data.preparation import CHECKSUMS, file_sha256, part_names, read_checksums, verify
from odyssey.data.task_names import definitions_directory
from odyssey.data.texts import C4_TRAIN, C4_VALIDATION, load_corpus, wikitext_rows
from odyssey.errors import ConfigError

C4_ROWS = {C4_VALIDATION: 40, C4_TRAIN: 30}


def _made_up(repository, config, split):
    """Rows with the official columns and numbers."""
    counts = {
        ("EleutherAI/lambada_openai", "test"): 5153, ("baber/piqa", "validation"): 1838,
        ("allenai/winogrande", "validation"): 1267, ("allenai/ai2_arc", "test"): 2376,
        ("Rowan/hellaswag", "validation"): 10042, ("cais/mmlu", "test"): 14042, ("cais/mmlu", "dev"): 285,
        ("Salesforce/wikitext", "test"): 4358, ("Salesforce/wikitext", "train"): 36718,
    }  # fmt: skip
    row = {
        "EleutherAI/lambada_openai": lambda n: {"text": f"Häuser {n} ✓"},
        "baber/piqa": lambda n: {"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2},
        "allenai/winogrande": lambda n: {"sentence": f"_ {n}", "option1": "a", "option2": "b", "answer": "1"},
        "allenai/ai2_arc": lambda n: {
            "id": n, "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"
        },
        "Rowan/hellaswag": lambda n: {
            "ind": n, "activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["1", "2", "3", "4"], "label": "0"
        },
        "cais/mmlu": lambda n: {"subject": f"s{n % 57}", "question": "q", "choices": list("abcd"), "answer": 3},
        "Salesforce/wikitext": lambda n: {"text": f" line {n} \n" if n % 3 else ""},
    }[repository]  # fmt: skip
    assert config == next(each.config for each in HUB_DATASETS.values() if each.repository == repository)
    return [row(n) for n in range(counts[repository, split])]


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """The hub in memory: what was asked of it, and repositories whose download fails."""
    import datasets
    import huggingface_hub

    asked, failing = [], set()

    def load_dataset(repository, config=None, split=None):
        asked.append(repository)
        if repository in failing:
            raise ConnectionError(f"Couldn't reach '{repository}' on the Hub\nsecond line")
        return _made_up(repository, config, split)

    def hf_hub_download(repository, file, repo_type):
        assert (repository, repo_type) == ("allenai/c4", "dataset")
        asked.append(file)
        if file in failing:
            raise ConnectionError("offline")
        path = tmp_path / "blobs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as lines:
            lines.writelines(json.dumps({"text": f"document {n}", "url": "u"}) + "\n" for n in range(C4_ROWS[file]))
        return str(path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(preparation, "_C4_ROWS", C4_ROWS)
    return asked, failing


def fetch(to, tasks="paper"):
    return main(["fetch", "--tasks", tasks, "--to", str(to)])


def test_everything_is_fetched_with_checksums(fake_hub, tmp_path, capsys):
    root = tmp_path / "data"
    assert fetch(root) == 0
    assert capsys.readouterr().err == ""
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    sums = read_checksums(root)
    assert files == {*sums, CHECKSUMS}
    assert len(sums) == 11
    assert all(file_sha256(root / file) == digest for file, digest in sums.items())
    assert re.fullmatch(r"([0-9a-f]{64}  \S+\n){11}", (root / CHECKSUMS).read_text())  # what sha256sum -c reads
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root), "--tasks", "paper"]) == 0
    assert "piqa: ok (checksums and rows)" in capsys.readouterr().out
    assert load_corpus("c4", "test", root=str(root)).documents[:2] == ["document 0", "document 1"]
    assert load_corpus("c4", "train", root=str(root)).origin == "c4-train.00000-of-01024.json.gz"
    assert load_corpus("wikitext2", "test", root=str(root)).documents[:2] == ["", " line 1 \n"]


def test_the_tasks_are_read_from_what_was_fetched(fake_hub, tmp_path, monkeypatch):
    from odyssey.data.task_files import task_source

    fetch(tmp_path / "data", "piqa,lambada_openai,hellaswag,mmlu,winogrande,arc_easy")
    for name in ("piqa", "lambada_openai", "hellaswag", "mmlu", "winogrande", "arc_easy"):
        assert task_source(name, str(tmp_path / "data"), tmp_path / "cache").origin != "hub"


def test_a_second_run_takes_up_where_the_first_stopped(fake_hub, tmp_path, capsys):
    asked, failing = fake_hub
    failing |= {"allenai/winogrande", C4_VALIDATION}
    root = tmp_path / "data"
    assert fetch(root) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["winogrande", "c4"]
    assert errors[0].endswith("(ConnectionError: Couldn't reach 'allenai/winogrande' on the Hub); run this again")
    assert not (root / "winogrande").exists()
    failing.clear()
    asked.clear()
    assert fetch(root) == 0
    assert asked == ["allenai/winogrande", C4_VALIDATION]
    # A file that changed is not the one that was fetched.
    (root / "piqa/valid.jsonl").write_text("{}\n")
    asked.clear()
    assert fetch(root, "paper") == 0
    assert asked == ["baber/piqa"]


def test_a_stopped_download_leaves_no_half_file(fake_hub, tmp_path, monkeypatch):
    import datasets

    def stops(repository, config=None, split=None):
        def rows():
            yield {"text": "one \n"}
            raise KeyboardInterrupt

        return rows()

    whole = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", stops)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, "wikitext2")
    assert not (tmp_path / "wikitext2/wiki.test.raw").exists()
    assert read_checksums(tmp_path) == {}
    monkeypatch.setattr(datasets, "load_dataset", whole)
    assert fetch(tmp_path, "wikitext2") == 0


def test_rows_that_are_not_the_official_number_get_no_checksum(fake_hub, tmp_path, monkeypatch, capsys):
    import datasets

    whole = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: whole(*args, **kwargs)[:-1])
    assert fetch(tmp_path, "lambada_openai") == 1
    assert "has 5152 rows, the official split has 5153" in capsys.readouterr().err
    assert read_checksums(tmp_path) == {}


def test_verify_names_every_problem_in_a_line(fake_hub, tmp_path, capsys):
    root = tmp_path / "data"
    fetch(root)
    labels = root / "piqa/valid-labels.lst"
    labels.write_text(labels.read_text().replace("0", "1"))
    (root / "mmlu/mmlu_dev.jsonl").unlink()
    (root / "winogrande/winogrande_xl_validation.jsonl").write_text('{"sentence": "_"}\n')
    with (root / CHECKSUMS).open("a") as sums:
        sums.write("0" * 64 + "  extra/file.txt\n")
    capsys.readouterr()
    assert main(["verify", str(root)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{labels}: its SHA-256 is not the one in SHA256SUMS; fetch it again",
        f"{root}/winogrande/winogrande_xl_validation.jsonl: its SHA-256 is not the one in SHA256SUMS; fetch it again",
        f"{root}/mmlu/mmlu_dev.jsonl: is missing",
        f"{root}/extra/file.txt: is in SHA256SUMS and missing",
    ]


def test_verify_without_checksums_counts_rows(fake_hub, tmp_path, capsys):
    root = tmp_path / "data"
    fetch(root, "winogrande,arc_easy,c4")
    (root / CHECKSUMS).unlink()
    short = root / "winogrande/winogrande_xl_validation.jsonl"
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:-1]))
    shard = root / "c4/c4-validation.00000-of-00008.json.gz"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert main(["verify", str(root)]) == 1
    captured = capsys.readouterr()
    assert "arc_easy: ok (rows; no checksum)" in captured.out
    assert len(captured.err.splitlines()) == 2
    assert f"{short}: has 1266 rows, the official split has 1267; fetch the whole file" in captured.err
    assert re.search(r"c4-validation.*: row \d+ cannot be read; fetch it again", captured.err)


def test_verify_of_what_is_asked_for(fake_hub, tmp_path, capsys):
    fetch(tmp_path, "piqa")
    assert main(["verify", str(tmp_path), "--tasks", "piqa,lambada_openai"]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/lambada/lambada_test.jsonl: is missing\n"


def test_verify_of_nothing(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "has none of the known files; python -m odyssey.data fetch --tasks paper --to" in capsys.readouterr().err
    assert verify(tmp_path / "absent") == [f"{tmp_path}/absent: no such directory"]
    (tmp_path / CHECKSUMS).write_text("nonsense\n")
    assert verify(tmp_path) == [
        f"{tmp_path}/{CHECKSUMS}: a line is not 'SHA-256  file'; remove the file and fetch again"
    ]


def test_names(capsys):
    assert part_names("piqa, mmlu,piqa") == ["piqa", "mmlu"]
    assert {"hellaswag", "c4", "calibration", "wikitext2"} < set(part_names("paper"))
    with pytest.raises(ConfigError, match="--tasks=pica: allowed: paper, lambada_openai"):
        part_names("pica")
    assert main(["fetch", "--tasks", "hellaswag_preprocessed", "--to", "x"]) == 2
    assert "allowed: paper" in capsys.readouterr().err


def test_wikitext_is_written_byte_for_byte_as_published(evaluation_data, tmp_path, monkeypatch):
    import datasets

    published = evaluation_data / "data/wikitext2/wiki.test.raw"
    rows = [{"text": text} for text in wikitext_rows(published.read_text(encoding="utf-8"))]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert fetch(tmp_path, "wikitext2") == 0
    assert (tmp_path / "wikitext2/wiki.test.raw").read_bytes() == published.read_bytes()


def test_the_official_files_here_are_whole(evaluation_data, capsys):
    names = "lambada_openai,piqa,winogrande,arc_easy,mmlu,wikitext2"
    assert main(["verify", str(evaluation_data / "data"), "--tasks", names]) == 0
    assert verify(evaluation_data / "data") == []
    assert "hellaswag_preprocessed: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("lambada_openai", "lambada/lambada_openai.yaml"), ("piqa", "piqa/piqa.yaml"),
        ("arc_easy", "arc/arc_easy.yaml"),
        ("winogrande", "winogrande/default.yaml"), ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("mmlu", "mmlu/default/_default_template_yaml"),
    ],
)  # fmt: skip
def test_the_repositories_are_lm_evals(name, definition):
    text = (definitions_directory() / definition).read_text()
    assert re.search(r"^dataset_path: (\S+)$", text, re.MULTILINE)[1] == HUB_DATASETS[name].repository
    config = re.search(r"^dataset_name: (\S+)$", text, re.MULTILINE)
    if config is not None:
        assert {"null": None}.get(config[1], config[1]) == HUB_DATASETS[name].config
