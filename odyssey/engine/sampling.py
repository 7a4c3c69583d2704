"""Choice of the next token from logits; works inside a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_k: keep that many likeliest tokens (0: all). top_p: then keep the
    likeliest tokens whose probabilities together reach top_p (1: all).

    Raises ValueError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def choose(
    logits: torch.Tensor, sampling: Sampling, out: torch.Tensor, generator: torch.Generator | None = None
) -> None:
    """Write the next token of every row of logits [B, vocab_size] into `out`, int64 [B]."""
    if sampling.greedy:
        torch.argmax(logits, dim=-1, out=out)
        return
    probabilities = filtered_probabilities(logits, sampling)
    # Dividing by exponential noise and taking the maximum draws from the distribution without a host round trip.
    noise = torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    torch.argmax(probabilities / noise, dim=-1, out=out)


def filtered_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """float32 [B, vocab_size]: the distribution that is drawn from, tokens outside top-k or top-p at 0.

    As in Transformers: temperature first, then top-k, then top-p on what is left; ties at the border stay in.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        border = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= sampling.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities
