"""Perplexity by the protocol of the GPTQ and SmoothQuant papers.

The corpus is joined and tokenized once (BOS only at the start), cut into floor(T / window) windows, the tail is
dropped, and the perplexity is exp of the mean over windows of the mean cross-entropy of their `window - 1` targets.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from odyssey.data.texts import Corpus, text_sha256
from odyssey.errors import MissingDataError
from odyssey.progress import Progress

PROTOCOL = "joined with two newlines, tokenized once, non-overlapping windows, tail dropped"


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Evaluate a causal LM; returns a JSON-ready result.

    value: the perplexity; stderr: its standard error over windows (delta method); windows, tokens: what was evaluated;
    text_sha256, tokens_sha256: of the whole text and of the evaluated tokens; nll: mean negative log-likelihood of
    every window, in nats. Results are comparable when protocol, window and tokens_sha256 agree.
    Raises MissingDataError when the corpus has fewer tokens than a window, ValueError when the logits have NaN.
    """
    text = corpus.joined()
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    count = len(tokens) // window
    if count == 0:
        raise MissingDataError(
            f"perplexity: {corpus.origin} has {len(tokens)} tokens, fewer than accuracy.perplexity.window={window}; "
            "use a longer text or a smaller window"
        )
    count = min(count, max_windows) if max_windows else count
    tokens = tokens[: count * window].reshape(count, window)
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
        "protocol": PROTOCOL,
        "window": window,
        "windows": count,
        "tokens": count * window,
        "text_sha256": text_sha256(text),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "nll": losses,
    }
