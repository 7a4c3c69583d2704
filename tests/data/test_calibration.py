import pytest
import torch
from helpers.checkpoints import byte_tokenizer

from odyssey.data.calibration import sample_calibration
from odyssey.data.texts import Corpus
from odyssey.errors import MissingDataError

STREAM = Corpus("file", ["abcdefghij" * 30], "stream.txt")
DOCUMENTS = Corpus("c4", ["x" * 20, "ab" * 40, "cd" * 50, "y" * 10, "ef" * 60], "c4.jsonl")


def _sample(corpus, **changes):
    arguments = {"num_samples": 3, "seqlen": 32, "seed": 0} | changes
    return sample_calibration(corpus, byte_tokenizer(), **arguments)


@pytest.mark.parametrize("corpus", [STREAM, DOCUMENTS], ids=["stream", "documents"])
def test_windows_are_contiguous_text_and_repeatable(corpus):
    first, again, other = _sample(corpus), _sample(corpus), _sample(corpus, seed=1)
    assert first.tokens.shape == (3, 32)
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest() == again.digest() != other.digest()
    text = corpus.joined()
    for window in first.tokens:
        assert byte_tokenizer().decode(window) in text


def test_c4_windows_come_from_single_documents_that_are_long_enough():
    for window in _sample(DOCUMENTS).tokens:
        decoded = byte_tokenizer().decode(window)
        assert sum(decoded in document for document in DOCUMENTS.documents) == 1


def test_a_bos_stands_at_the_start_of_a_text_alone():
    (window,) = sample_calibration(STREAM, byte_tokenizer(bos=True), num_samples=1, seqlen=301, seed=0).tokens
    assert window.tolist() == [0, *byte_tokenizer()(STREAM.joined()).input_ids]
    documents = Corpus("c4", ["ab" * 16, "cd" * 15], "c4.jsonl")
    (window,) = sample_calibration(documents, byte_tokenizer(bos=True), num_samples=1, seqlen=32, seed=0).tokens
    assert window.tolist() == [0, *byte_tokenizer()("ab" * 16).input_ids][:32]


def test_every_window_can_be_drawn():
    """All starts of the stream; of a document all but its last, as in GPTQ's code."""
    stream = Corpus("file", ["abcdefgh"], "stream.txt")
    found = {byte_tokenizer().decode(window) for window in _sample(stream, num_samples=60, seqlen=5).tokens}
    assert found == {"abcde", "bcdef", "cdefg", "defgh"}
    texts = ["abcdefgh", "stuvwxyz", "12345678"]
    found = set()
    for seed in range(60):
        drawn = _sample(Corpus("c4", texts, "c4.jsonl"), num_samples=2, seqlen=5, seed=seed)
        found |= {byte_tokenizer().decode(window) for window in drawn.tokens}
    assert found == {text[start : start + 5] for text in texts for start in range(3)}


def test_provenance_says_what_was_drawn():
    provenance = _sample(STREAM).provenance
    assert (provenance["dataset"], provenance["num_samples"], provenance["seqlen"]) == ("file", 3, 32)
    assert len(provenance["text_sha256"]) == 64


def test_too_little_text():
    with pytest.raises(MissingDataError, match=r"300 tokens, fewer than calibration.seqlen=512"):
        _sample(STREAM, seqlen=512)
    with pytest.raises(MissingDataError, match=r"only 3 documents .* calibration.num_samples=4"):
        _sample(DOCUMENTS, num_samples=4)
