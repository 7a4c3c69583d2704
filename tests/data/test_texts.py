import gzip
import json

import pytest

from odyssey.data.texts import load_corpus, text_sha256, wikitext_rows
from odyssey.errors import MissingDataError

ARTICLE = " \n = Title = \n \n First line . \n Second line . \n"


def test_rows_are_those_of_the_hub_data_set():
    assert wikitext_rows(ARTICLE) == ["", " = Title = \n", "", " First line . \n", " Second line . \n"]


def test_only_a_newline_ends_a_row():
    separators = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    text = "".join(f" a{separator}b" for separator in separators) + " \n" + separators + "\nlast"
    assert wikitext_rows(text) == [text.split("\n")[0] + "\n", "", "last"]


def test_wikitext_from_data_root(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(ARTICLE)
    corpus = load_corpus("wikitext2", "test", root=str(tmp_path))
    assert corpus.origin == "wiki.test.raw"
    assert corpus.joined() == "\n\n = Title = \n\n\n\n\n First line . \n\n\n Second line . \n"


def test_wikitext_text_is_the_published_one(evaluation_data):
    corpus = load_corpus("wikitext2", "test", root=str(evaluation_data / "data"))
    # The hub's test split has 4358 rows.
    assert len(corpus.documents) == 4358
    assert text_sha256("".join(corpus.documents)) != text_sha256(corpus.joined())


@pytest.mark.parametrize("compressed", [False, True])
def test_c4_from_data_root_and_file(tmp_path, compressed):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    name = "c4-train.jsonl" + (".gz" if compressed else "")
    (tmp_path / "c4").mkdir()
    path = tmp_path / "c4" / name
    path.write_bytes(gzip.compress(lines.encode()) if compressed else lines.encode())
    assert load_corpus("c4", "train", root=str(tmp_path)).documents == ["one", "two"]
    assert load_corpus("file", "train", path=str(path)).documents == ["one", "two"]
    shard = load_corpus("c4", "test", path=str(path))
    assert (shard.name, shard.origin, shard.documents) == ("c4", name, ["one", "two"])


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(MissingDataError, match="line 2"):
        load_corpus("file", "train", path=str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingDataError, match="absent.txt: no such file"):
        load_corpus("file", "train", path=str(tmp_path / "absent.txt"))
    with pytest.raises(MissingDataError, match="a directory; give a text file"):
        load_corpus("file", "train", path=str(tmp_path))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(MissingDataError, match="not UTF-8"):
        load_corpus("file", "train", path=str(path))


def test_documents_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "text.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(MissingDataError, match="text.json.gz: cannot be read"):
        load_corpus("file", "train", path=str(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(MissingDataError, match="text.json.gz: cannot be read"):
        load_corpus("file", "train", path=str(path))
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(MissingDataError, match="line 2 is not a JSON object with a 'text' field"):
        load_corpus("file", "train", path=str(path))


def test_an_unreachable_hub_says_where_to_put_a_copy(monkeypatch, tmp_path):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(MissingDataError, match=r"put a copy at .*wikitext2/wiki.test.raw"):
        load_corpus("wikitext2", "test", root=str(tmp_path))
    with pytest.raises(
        MissingDataError, match="data.root=DIR.* python -m odyssey.data fetch --tasks calibration --to DIR"
    ):
        load_corpus("c4", "train")
    with pytest.raises(MissingDataError, match="fetch --tasks c4 --to DIR"):
        load_corpus("c4", "test")


def test_embedded_splits_differ():
    train, test = load_corpus("embedded", "train"), load_corpus("embedded", "test")
    assert len(train.joined()) > 3 * len(test.joined()) > 30_000
