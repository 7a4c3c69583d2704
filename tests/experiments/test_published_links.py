"""What the documents link to and the records that they name are there."""

from __future__ import annotations

import re

import pytest
from helpers.published import PROJECT

DOCUMENTS = [
    *(PROJECT / name for name in ("README.md", "CHANGELOG.md", "kernels/fastgemm/README.md", "results/README.md")),
    *sorted((PROJECT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
# A path in backquotes, without placeholders.
NAMED = re.compile(r"`((?:results|docs|conf|tests|experiments|odyssey|baselines|kernels)/[\w./-]+)`")
RECORD = re.compile(r"`((?:plans/)?\d{4}-\d{2}-\d{2}[\w-]*\.json)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_and_paths_exist(document):
    text = document.read_text()
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [path for path in NAMED.findall(text) if not (PROJECT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_records_that_are_named_by_their_file_exist(document):
    folders = [path for path in (PROJECT / "results").rglob("*") if path.is_dir()]
    names = RECORD.findall(document.read_text())
    assert [name for name in names if not any((folder / name).is_file() for folder in folders)] == []


def test_the_patterns_find_what_they_are_for():
    assert LINK.findall("[a](docs/lab.md#x) [b](https://example.org/c)") == ["docs/lab.md"]
    assert NAMED.findall("`results/h100/gemm/` and `results/<device>/`") == ["results/h100/gemm/"]
    assert RECORD.findall("`2026-11-23-kinds.json`, `plans/2026-11-22-a.json`") == [
        "2026-11-23-kinds.json",
        "plans/2026-11-22-a.json",
    ]
