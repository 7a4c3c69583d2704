"""Prompts in, tokens out: prefill in chunks, then one decoding step after the other, on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from odyssey.engine.cache import KeyValueCache
from odyssey.engine.decoder import Chunk, Decoder, Segment
from odyssey.engine.greedy import finish_step
from odyssey.engine.sampling import GREEDY, Sampling, choose
from odyssey.engine.weights import DecoderWeights

# Tokens that go through the decoder together: enough to keep a GPU's products at their peak.
PREFILL_TOKENS = 8192
# Prefills up to this many tokens are replayed from a graph where asked: longer ones are not bound by launches.
GRAPH_PREFILL_TOKENS = 4096
# How many steps run before the host looks for the end-of-sequence token.
_STEPS_PER_LOOK = 8


class Engine:
    """A decoder with a static key/value cache.

    weights: see `odyssey.engine.weights`. batch_size, max_len: sequences and tokens of each (prompt and generated) that
    the cache has room for. graphs: None takes CUDA graphs on a GPU. cache: one to share with other engines of the same
    shapes, which run at other times. prefill_tokens: most tokens in a prefill chunk.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        batch_size: int = 1,
        max_len: int = 2048,
        graphs: bool | None = None,
        cache: KeyValueCache | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        device = weights.device
        if cache is None:
            cache = KeyValueCache(weights.shapes, batch_size, max_len, weights.dtype, device)
        elif not cache.fits(weights.shapes, weights.dtype, device):
            raise ValueError("cache: was made for a decoder of other shapes, dtype or device")
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        self.weights, self.cache, self.device = weights, cache, device
        self.prefill_tokens = prefill_tokens
        self._decoder = Decoder(weights, cache)
        self._graphs = device.type == "cuda" if graphs is None else graphs
        # The newest token of every sequence; a decoding step reads and replaces it.
        self._tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)
        self._steps: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}
        self._prefills: dict[tuple, _CapturedPrefill] = {}
        self._generator = torch.Generator(device)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        eos_tokens: Sequence[int] = (),
        seed: int = 0,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Tokens that follow each prompt; a sequence ends behind the first of `eos_tokens`, which it keeps.

        on_tokens(sequence, tokens) is called as they come. Raises ValueError for an empty prompt, no or too many
        prompts, tokens outside the vocabulary, or prompts that leave no room for max_new_tokens in the cache.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.cache.max_len:
            raise ValueError(
                f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}: "
                f"the cache holds {self.cache.max_len}"
            )
        # Before the capture, which would be of a step that cannot run.
        count = len(self._lengths(prompts))
        self.prepare(count, sampling)
        # Behind the capture, whose trial steps draw, too.
        self._generator.manual_seed(seed)
        history = torch.empty(max_new_tokens, count, dtype=torch.int64, device=self.device)
        self.prefill(prompts, sampling)
        history[0] = self._tokens[:count]
        results: list[list[int]] = [[] for _ in prompts]
        open_rows, done, look = set(range(count)), 0, 1
        for step in range(1, max_new_tokens + 1):
            if step in (look, max_new_tokens):
                for row in sorted(open_rows):
                    new, ended = _until(history[done:step, row].tolist(), eos_tokens)
                    results[row] += new
                    if on_tokens is not None and new:
                        on_tokens(row, new)
                    if ended:
                        open_rows.discard(row)
                done, look = step, step + (1 if on_tokens is not None else _STEPS_PER_LOOK)
            if not open_rows or step == max_new_tokens:
                break
            self.step(count, sampling)
            history[step] = self._tokens[:count]
        return results

    @torch.inference_mode()
    def prepare(self, count: int, sampling: Sampling = GREEDY, prompt_len: int | None = None) -> None:
        """Capture the graphs of a decoding step of `count` sequences and, with `prompt_len`, of their prefill (all of
        that length), so that no later call does it. Forgets what is in the cache. Nothing to do without graphs."""
        if not self._graphs:
            return
        if (count, sampling) not in self._steps:
            self._steps[count, sampling] = self._capture_step(count, sampling)
        if prompt_len is not None and count * prompt_len <= min(self.prefill_tokens, GRAPH_PREFILL_TOKENS):
            (segments,) = self._plan([prompt_len] * count)
            if segments not in self._prefills:
                self._prefills[segments] = _CapturedPrefill(self, segments)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]] | torch.Tensor, sampling: Sampling = GREEDY) -> torch.Tensor:
        """Read the prompts into the cache's first rows and choose the first new token of each.

        prompts: lists of tokens, or int64 [B, length] where all have the same length.
        Returns the logits of every prompt's last token [B, vocab_size].
        Raises ValueError for an empty prompt, no or too many prompts, a prompt that is longer than the cache, or, of
        lists, tokens outside the vocabulary.
        """
        lengths = self._lengths(prompts)
        count = len(lengths)
        tokens = self._flat(prompts)
        plan = self._plan(lengths)
        if len(plan) == 1 and plan[0] in self._prefills:
            output = self._prefills[plan[0]](tokens)
        else:
            # All chunks before the first pass: what the host copies to the device would wait for the passes before it.
            chunks = [Chunk.of(segments, self.device) for segments in plan]
            parts = tokens.split([len(chunk.positions) for chunk in chunks])
            logits = [self._decoder.prefill(part, chunk) for part, chunk in zip(parts, chunks, strict=True)]
            output = logits[0] if len(logits) == 1 else torch.cat(logits)
        choose(output, sampling, self._tokens[:count], self._generator)
        self._set_lengths(lengths)
        return output

    @torch.inference_mode()
    def step(self, count: int, sampling: Sampling = GREEDY) -> None:
        """One decoding step of the first `count` sequences; the chosen tokens are in `newest`. The host does not wait
        for it."""
        graph = self._steps.get((count, sampling))
        if graph is not None:
            graph.replay()
        else:
            self._step(count, sampling)

    @torch.inference_mode()
    def decode_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append the given tokens, int64 [B], to the first B sequences; logits of what follows [B, vocab_size]."""
        logits = self._decoder.decode(tokens)
        self.cache.lengths[: len(tokens)] += 1
        return logits

    def newest(self, count: int) -> torch.Tensor:
        """The newest token of the first `count` sequences, int64 on the device; the next step overwrites it."""
        return self._tokens[:count]

    def _step(self, count: int, sampling: Sampling) -> None:
        tokens, lengths = self._tokens[:count], self.cache.lengths[:count]
        logits = self._decoder.decode(tokens)
        if sampling.greedy:
            finish_step(logits, tokens, lengths)
        else:
            choose(logits, sampling, tokens, self._generator)
            lengths += 1

    def _capture_step(self, count: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if not sampling.greedy:
            graph.register_generator_state(self._generator)
        # Lengths of 0: the steps that are run to warm up write where every prefill writes anew.
        self.cache.lengths.zero_()
        _capture(graph, lambda: self._step(count, sampling))
        self.cache.lengths.zero_()
        return graph

    def _plan(self, lengths: Sequence[int]) -> list[tuple[Segment, ...]]:
        """Chunks of at most `prefill_tokens` tokens: whole prompts together, a longer prompt in pieces."""
        chunks: list[tuple[Segment, ...]] = []
        open_chunk: list[Segment] = []
        room = self.prefill_tokens
        for row, length in enumerate(lengths):
            start = 0
            if open_chunk and length > room:
                chunks.append(tuple(open_chunk))
                open_chunk, room = [], self.prefill_tokens
            while start < length:
                size = min(length - start, room)
                open_chunk.append(Segment(row, start, size, last=start + size == length))
                start, room = start + size, room - size
                if not room:
                    chunks.append(tuple(open_chunk))
                    open_chunk, room = [], self.prefill_tokens
        return chunks + ([tuple(open_chunk)] if open_chunk else [])

    def _lengths(self, prompts: Sequence[Sequence[int]] | torch.Tensor) -> list[int]:
        """Tokens of each prompt; raises what `prefill` does."""
        lengths = [len(prompt) for prompt in prompts]
        if not 1 <= len(lengths) <= self.cache.batch_size:
            raise ValueError(f"{len(lengths)} prompts for a cache of {self.cache.batch_size} sequences")
        if min(lengths) < 1 or max(lengths) > self.cache.max_len:
            raise ValueError(f"a prompt must have 1 to {self.cache.max_len} tokens, got {min(lengths)}..{max(lengths)}")
        if not isinstance(prompts, torch.Tensor):
            vocabulary = self.weights.shapes.vocab_size
            first, last = min(map(min, prompts)), max(map(max, prompts))
            if first < 0 or last >= vocabulary:
                outside = first if first < 0 else last
                raise ValueError(f"token {outside}: the model's vocabulary has the tokens 0 to {vocabulary - 1}")
        return lengths

    def _flat(self, prompts: Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
        if isinstance(prompts, torch.Tensor):
            return prompts.to(self.device).flatten()
        return torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64, device=self.device)

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        if len(set(lengths)) == 1:
            # No copy from the host, which would wait for the prefill.
            self.cache.lengths[: len(lengths)] = lengths[0]
        else:
            self.cache.lengths[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=self.device)


class _CapturedPrefill:
    """The prefill of one chunk as a CUDA graph."""

    def __init__(self, engine: Engine, segments: tuple[Segment, ...]) -> None:
        chunk = Chunk.of(segments, engine.device)
        self._tokens = torch.zeros(len(chunk.positions), dtype=torch.int64, device=engine.device)
        self._graph = torch.cuda.CUDAGraph()
        self._chunk = chunk  # the graph reads its tensors
        self._logits = _capture(self._graph, lambda: engine._decoder.prefill(self._tokens, chunk))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], object]):
    """Capture `work`, which has run before, so that libraries have loaded and chosen their kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        return work()


def _until(tokens: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Tokens up to and with the first of `ends`, and whether one was there."""
    for number, token in enumerate(tokens):
        if token in ends:
            return tokens[: number + 1], True
    return tokens, False
