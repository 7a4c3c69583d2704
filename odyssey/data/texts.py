"""Corpora by name. Each comes from a local copy under `data.root`, from a file the user names, or from the hub.

Layout of `data.root` (all optional, the hub is asked for what is not there):
    wikitext2/wiki.train.raw, wiki.test.raw     WikiText-2 raw v1, one line per row
    c4/*.json, *.json.gz or *.jsonl             C4 documents, {"text": ...} per line; names with "train" or "val"
    [hub/]datasets--OWNER--NAME/snapshots/*     either of them in the layout of the hub's own cache
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from odyssey.data.hub import HUB_DATASETS, find_snapshot
from odyssey.errors import MissingDataError

DATASETS = ("wikitext2", "c4", "embedded", "file")
C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"
C4_VALIDATION = "en/c4-validation.00000-of-00008.json.gz"
_DOCUMENT_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Corpus:
    """Text as documents. `name` is the dataset's, `origin` says where it was read (file name or hub id)."""

    name: str
    documents: list[str] = field(repr=False)
    origin: str

    def joined(self, separator: str = "\n\n") -> str:
        return separator.join(self.documents)


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_corpus(dataset: str, split: str, *, path: str | None = None, root: str | None = None) -> Corpus:
    """The corpus `dataset` ("wikitext2", "c4", "embedded", "file"), split "train" or "test".

    path: the file to read when dataset is "file" (plain text, or JSON lines with a "text" field), or for "c4" a shard
    in place of the one under `root`.
    Raises MissingDataError with what to do when it is neither local nor reachable.
    """
    if dataset == "file":
        return _from_file(path)
    if dataset == "embedded":
        from odyssey.models.embedded import evaluation_text, training_text

        text = training_text() if split == "train" else evaluation_text()
        return Corpus("embedded", [text], "pydoc_data.topics of this Python")
    if dataset == "wikitext2":
        return _wikitext2(split, root)
    if dataset == "c4":
        return _c4(split, root) if path is None else replace(_from_file(path), name="c4")
    raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}")


def _from_file(path: str | None) -> Corpus:
    if not path:
        raise MissingDataError("dataset=file needs a path; give the file's name")
    file = Path(path).expanduser()
    if not file.is_file():
        problem = "a directory" if file.is_dir() else "no such file"
        raise MissingDataError(f"{path}: {problem}; give a text file or JSON lines with a 'text' field")
    try:
        if file.name.endswith(_DOCUMENT_SUFFIXES):
            return Corpus("file", list(_documents(file)), file.name)
        return Corpus("file", [file.read_text(encoding="utf-8")], file.name)
    except UnicodeDecodeError as error:
        raise MissingDataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise MissingDataError(f"{path}: cannot be read ({error}); give a whole file") from error


def _documents(file: Path) -> Iterator[str]:
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise MissingDataError(f"{file}: line {number} is not a JSON object with a 'text' field")
            yield text


def wikitext_rows(text: str) -> list[str]:
    """Rows of a WikiText-style file as the hub's data set has them: a line keeps its newline, an empty line is ""."""
    # Not str.splitlines, which ends lines at form feeds and Unicode's separators, too.
    return [line if line.strip() else "" for line in io.StringIO(text)]


def _wikitext2(split: str, root: str | None) -> Corpus:
    if root:
        for folder in ("wikitext2", "wikitext-2-raw"):
            file = Path(root).expanduser() / folder / f"wiki.{split}.raw"
            if file.is_file():
                return Corpus("wikitext2", wikitext_rows(file.read_text(encoding="utf-8")), file.name)
    hub = HUB_DATASETS["wikitext2"]
    snapshot = find_snapshot(root, "wikitext2")
    where, origin = (
        (hub.repository, f"hub:{hub.repository}/{hub.config}")
        if snapshot is None
        else (str(snapshot.path), snapshot.origin)
    )
    rows = _from_hub(where, "wikitext2", root, f"wikitext2/wiki.{split}.raw", name=hub.config, split=split)
    return Corpus("wikitext2", rows, origin)


def _c4(split: str, root: str | None) -> Corpus:
    marker, shard = ("train", C4_TRAIN) if split == "train" else ("val", C4_VALIDATION)
    if root:
        folder = Path(root).expanduser() / "c4"
        files = sorted(
            file for file in folder.glob("*") if marker in file.name and file.name.endswith(_DOCUMENT_SUFFIXES)
        )
        if files:
            return Corpus("c4", list(_documents(files[0])), files[0].name)
        snapshot = find_snapshot(root, "c4")
        if snapshot is not None and (snapshot.path / shard).is_file():
            return Corpus("c4", list(_documents(snapshot.path / shard)), f"{snapshot.origin}/{shard}")
    documents = _from_hub(
        HUB_DATASETS["c4"].repository, "c4", root, f"c4/{Path(shard).name}", data_files={split: shard}, split=split
    )
    return Corpus("c4", documents, f"hub:{HUB_DATASETS['c4'].repository}/{shard}")


def _from_hub(hub_id: str, dataset: str, root: str | None, local_name: str, **arguments) -> list[str]:
    from datasets import load_dataset

    try:
        return list(load_dataset(hub_id, **arguments)["text"])
    except Exception as error:  # datasets raises a different class for every way a download can fail
        where = f"{root}/{local_name}" if root else f"DIR/{local_name} with data.root=DIR"
        part = "calibration" if "train" in local_name and dataset == "c4" else dataset
        raise MissingDataError(
            f"{dataset}: the hub's {hub_id} cannot be read ({type(error).__name__}); put a copy at {where}, fetch it "
            f"where the hub answers: python -m odyssey.data fetch --tasks {part} --to {root or 'DIR'}, or name a file"
        ) from error
