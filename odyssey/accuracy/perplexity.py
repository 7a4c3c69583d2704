"""Perplexity by the protocols of the GPTQ and SmoothQuant papers.

WikiText-2, a file, the embedded text: the corpus is joined and tokenized once (BOS only at the start), cut into
floor(T / window) windows, the tail is dropped. C4: a random window of each of 256 random documents that are long
enough, drawn from a validation shard as in GPTQ's reference code. In both cases the perplexity is exp of the mean over
windows of the mean cross-entropy of their `window - 1` targets.
"""

from __future__ import annotations

import hashlib
import math
import random

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from odyssey.data.texts import Corpus, text_sha256
from odyssey.errors import MissingDataError
from odyssey.progress import Progress

PROTOCOL = "joined with two newlines, tokenized once, non-overlapping windows, tail dropped"
C4_WINDOWS = 256


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict:
    """Evaluate a causal LM; returns a JSON-ready result.

    max_windows: the first so many windows. seed: of C4's draw; other corpora have none.
    value: the perplexity; stderr: its standard error over windows (delta method); windows, tokens: what was evaluated;
    text_sha256, tokens_sha256: of the whole text and of the evaluated tokens; nll: mean negative log-likelihood of
    every window, in nats. Results are comparable when protocol, window and tokens_sha256 agree.
    Raises MissingDataError when the corpus has fewer tokens than a window (C4: no document that is longer), ValueError
    when the logits have NaN.
    """
    if corpus.name == "c4":
        wanted = min(C4_WINDOWS, max_windows or C4_WINDOWS)
        tokens = document_windows(corpus, tokenizer, window=window, count=wanted, seed=seed)
        protocol = f"windows of {wanted} random documents that are long enough, seed {seed}"
    else:
        tokens = stream_windows(corpus, tokenizer, window=window)[:max_windows]
        protocol = PROTOCOL
    count = len(tokens)
    device = next(model.parameters()).device
    losses = []
    with (progress or Progress.silent()).task(f"perplexity on {corpus.name}", count) as task:
        for index in range(count):
            batch = tokens[index : index + 1].to(device)
            logits = model(batch, use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, batch[0, 1:]).item())
            task.report(f"{math.exp(min(50.0, sum(losses) / len(losses))):.3f}")
            task.advance()
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"perplexity on {corpus.name}: the model's loss is not finite")
    mean = sum(losses) / count
    variance = sum((loss - mean) ** 2 for loss in losses) / max(1, count - 1)
    return {
        "value": math.exp(mean),
        "stderr": math.exp(mean) * math.sqrt(variance / count),
        "dataset": corpus.name,
        "origin": corpus.origin,
        "protocol": protocol,
        "window": window,
        "windows": count,
        "tokens": count * window,
        "text_sha256": text_sha256(corpus.joined()),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "nll": losses,
    }


def stream_windows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, window: int) -> torch.Tensor:
    """All whole windows of the joined corpus, int64 [windows, window]. Raises MissingDataError when there is none."""
    tokens = torch.tensor(tokenizer(corpus.joined(), verbose=False).input_ids)
    count = len(tokens) // window
    if count == 0:
        raise MissingDataError(
            f"perplexity: {corpus.origin} has {len(tokens)} tokens, fewer than accuracy.perplexity.window={window}; "
            "use a longer text or a smaller window"
        )
    return tokens[: count * window].reshape(count, window)


def document_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, window: int, count: int, seed: int
) -> torch.Tensor:
    """`count` windows of random documents, int64 [count, window], drawn as GPTQ's reference code draws from C4.

    Python's generator with `seed`; a document of at most `window` tokens is drawn again; documents may come twice.
    The first windows do not depend on `count`. Raises MissingDataError when no document is long enough.
    """
    generator = random.Random(seed)
    rejected: set[int] = set()
    accepted: dict[int, torch.Tensor] = {}
    windows = []
    while len(windows) < count:
        position = generator.randint(0, len(corpus.documents) - 1)
        if position in rejected:
            continue
        if position not in accepted:
            document = corpus.documents[position]
            # A token is at least one byte: shorter documents cannot hold a window, and tokenizing them is wasted.
            long_enough = len(document.encode()) >= window
            tokens = torch.tensor(tokenizer(document, verbose=False).input_ids) if long_enough else torch.empty(0)
            if len(tokens) <= window:
                rejected.add(position)
                if len(rejected) == len(corpus.documents):
                    raise MissingDataError(
                        f"perplexity: no document of {corpus.origin} has more than accuracy.perplexity.window={window} "
                        "tokens; use a whole shard of C4 or a smaller window"
                    )
                continue
            accepted[position] = tokens
        start = generator.randint(0, len(accepted[position]) - window - 1)
        windows.append(accepted[position][start : start + window])
    return torch.stack(windows)
