"""Calibration samples: windows of tokens drawn with a seed, the same for every method."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from odyssey.data.texts import Corpus, text_sha256
from odyssey.errors import MissingDataError


@dataclass
class CalibrationTokens:
    """Token ids int64 [num_samples, seqlen] and where they come from (JSON-ready)."""

    tokens: torch.Tensor
    provenance: dict

    def digest(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int64).numpy().tobytes()).hexdigest()[:16]


def sample_calibration(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seqlen: int, seed: int
) -> CalibrationTokens:
    """Draw `num_samples` windows of `seqlen` tokens.

    As GPTQ's reference protocol: C4 gives a random window of a random document that is long enough; any other corpus is
    joined into one stream of which random windows are taken. Raises MissingDataError when the corpus is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if corpus.name == "c4":
        tokens = _from_documents(corpus, tokenizer, num_samples, seqlen, generator)
    else:
        tokens = _from_stream(corpus, tokenizer, num_samples, seqlen, generator)
    provenance = {
        "dataset": corpus.name,
        "origin": corpus.origin,
        "text_sha256": text_sha256(corpus.joined()),
        "num_samples": num_samples,
        "seqlen": seqlen,
        "seed": seed,
    }
    return CalibrationTokens(tokens, provenance)


def _draw(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (1,), generator=generator))


def _from_stream(corpus: Corpus, tokenizer, num_samples: int, seqlen: int, generator: torch.Generator) -> torch.Tensor:
    stream = torch.tensor(tokenizer(corpus.joined(), verbose=False).input_ids)
    if len(stream) < seqlen:
        raise MissingDataError(
            f"calibration: {corpus.origin} has {len(stream)} tokens, fewer than calibration.seqlen={seqlen}; "
            "use a longer text"
        )
    starts = [_draw(len(stream) - seqlen + 1, generator) for _ in range(num_samples)]
    return torch.stack([stream[start : start + seqlen] for start in starts])


def _from_documents(
    corpus: Corpus, tokenizer, num_samples: int, seqlen: int, generator: torch.Generator
) -> torch.Tensor:
    windows: list[torch.Tensor] = []
    order = torch.randperm(len(corpus.documents), generator=generator).tolist()
    for position in order:
        if len(windows) == num_samples:
            break
        document = corpus.documents[position]
        # A token is at least one byte: shorter documents cannot hold a window, and tokenizing them is wasted.
        if len(document.encode()) < seqlen:
            continue
        tokens = torch.tensor(tokenizer(document, verbose=False).input_ids)
        if len(tokens) > seqlen:
            start = _draw(len(tokens) - seqlen, generator)
            windows.append(tokens[start : start + seqlen])
    if len(windows) < num_samples:
        raise MissingDataError(
            f"calibration: only {len(windows)} documents of {corpus.origin} have more than {seqlen} tokens, "
            f"calibration.num_samples={num_samples} are needed; lower calibration.num_samples or calibration.seqlen"
        )
    return torch.stack(windows)
