"""The text of the embedded model: the language topics that every CPython carries for ``help()``.

The text is read from the standard library at run time (``pydoc_data.topics``), so nothing is downloaded
and nobody's text lies in this repository. It differs between Python versions: a figure measured on it is
comparable with another one only where `text_sha256` agrees, so that hash belongs in every record.

Whitespace normalisation, per topic: tabs become eight-column stops, trailing blanks are cut from every line,
runs of blank lines become one, blank lines at the ends are dropped. Indentation and line breaks stay as they
are. Topics are joined in alphabetical order by one blank line.

Split by topic: the SHA-256 of the topic's name sends it to one part, so a topic keeps its part across Python
versions.

* ``evaluation``: perplexity only;
* ``validation``: early stopping of the training (a part of `training_text`);
* ``fit``: what gradients come from (the rest of `training_text`).

CPython's topics repeat each other ("specialnames" contains "attribute-access" word for word), so a split by
name alone would leak. A paragraph of at least `MIN_REPEATED_CHARS` characters, compared without regard to
whitespace, is therefore kept once in all: in the evaluation part if it occurs there, else in the validation
part, else at its first occurrence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

PARTS = ("evaluation", "validation", "fit")
MIN_REPEATED_CHARS = 40
"""Paragraphs shorter than this (headings, one-line code) may repeat between topics and parts."""

# The salt was chosen by the parts' sizes alone, before anything was trained: with few topics of very
# different lengths most salts miss the shares. This one gives 13.5-14.5 % evaluation and 8-9 % validation
# (by characters, CPython 3.11 to 3.13).
_SALT = "odyssey-embedded-text-v240"
_BUCKETS = 1000
_EVALUATION_BUCKETS = 130
_VALIDATION_BUCKETS = 90


def topic_part(name: str) -> str:
    """Part ("evaluation", "validation" or "fit") of the topic called `name`; depends on the name alone."""
    digest = hashlib.sha256(f"{_SALT}:{name}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % _BUCKETS
    if bucket < _EVALUATION_BUCKETS:
        return "evaluation"
    return "validation" if bucket < _EVALUATION_BUCKETS + _VALIDATION_BUCKETS else "fit"


def normalise(text: str) -> str:
    """`text` with the whitespace normalisation that the module's docstring states; idempotent."""
    lines = "\n".join(line.expandtabs().rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def _keys(paragraphs: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each paragraph with its whitespace-blind key, None where it is short enough to repeat."""
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        yield paragraph, key if len(key) >= MIN_REPEATED_CHARS else None


def repeated_keys(texts: Iterable[str]) -> set[str]:
    """The set for `distinct_paragraphs` that says: all long paragraphs of `texts` have been seen."""
    return {key for text in texts for _, key in _keys(text.split("\n\n")) if key}


def distinct_paragraphs(text: str, seen: set[str]) -> str:
    """Normalised `text` without its long paragraphs that are in `seen`; adds those it keeps to `seen`."""
    kept = []
    for paragraph, key in _keys(text.split("\n\n")):
        if key is None or key not in seen:
            kept.append(paragraph)
        if key is not None:
            seen.add(key)
    return "\n\n".join(kept)


def split_topics(topics: dict[str, str]) -> dict[str, dict[str, str]]:
    """Normalise `topics` (name -> text), deal them out to `PARTS` and drop repeated paragraphs.

    Returns part -> name -> text, names in alphabetical order; a topic of which nothing is left is absent.
    """
    parts: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    seen: set[str] = set()
    for part in PARTS:
        for name in sorted(name for name in topics if topic_part(name) == part):
            text = distinct_paragraphs(normalise(topics[name]), seen)
            if text:
                parts[part][name] = text
    return parts


def python_topics() -> dict[str, dict[str, str]]:
    """`split_topics` of the running interpreter's own topics.

    Raises RuntimeError where the Python installation was stripped of ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "model=tiny needs the standard library module 'pydoc_data.topics', which this Python lacks: "
            "use a CPython whose standard library is complete"
        ) from error
    return split_topics(topics)


def training_text() -> str:
    """Text for training and calibration: the ``fit`` and ``validation`` parts, not `evaluation_text`."""
    parts = python_topics()
    topics = parts["fit"] | parts["validation"]
    return "\n\n".join(topics[name] for name in sorted(topics))


def evaluation_text() -> str:
    """Text for perplexity: the topics that neither the training nor its early stopping saw."""
    return "\n\n".join(python_topics()["evaluation"].values())


def text_sha256(text: str) -> str:
    """SHA-256 (hex) of `text` as UTF-8: names the Python-dependent text that a figure was measured on."""
    return hashlib.sha256(text.encode()).hexdigest()
