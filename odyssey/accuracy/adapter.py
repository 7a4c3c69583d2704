"""lm-eval's adapter for Transformers models around a loaded model, its linear layers as they are.

Importing this module imports lm-eval (seconds); the cell does so only when tasks are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from odyssey.accuracy.prefix_tree import batches, pack, score
from odyssey.errors import UnsupportedError
from odyssey.progress import Progress

# Strings per call of the tokenizer, which works on them in parallel.
_STRINGS = 1024


class HarnessModel(HFLM):
    """lm-eval's requests answered by a model that is already loaded.

    Log-likelihoods are those of lm-eval's own adapter up to the rounding of attention's sums: same tokens, same cut of
    prompts that do not fit into the model's positions (counted in `truncated`), log-softmax in float32 whatever the
    logits' dtype is. What sequences have in common is computed once (odyssey.accuracy.prefix_tree).

    requests: answered. tokens_computed: that went through the model, padding included. tokens_unshared: that lm-eval's
    own adapter would compute without any padding; None where tokens are generated. gpu_seconds: of the model's work,
    None on CPU.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, batch_tokens: int = 8192
    ) -> None:
        """batch_size: requests per forward pass where tokens are generated. batch_tokens: tokens per forward pass
        where log-likelihoods are asked for, padding included; a longer sequence is a pass of its own."""
        prefix = None
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            # lm-eval conditions an empty context on this token and asks the tokenizer alone for it.
            prefix = model.config.bos_token_id
            if prefix is None:
                raise UnsupportedError("accuracy.tasks: neither the tokenizer nor config.json has a BOS or EOS token")
        with quiet():
            # A copy of the tokenizer: lm-eval adds a padding token where there is none.
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
                softmax_dtype=torch.float32, prefix_token_id=prefix,
            )  # fmt: skip
        self.batch_tokens = batch_tokens
        self.start("", Progress.silent())

    def start(self, title: str, progress: Progress) -> None:
        """Begin a task: set its name in progress reports and all counters to zero."""
        self.title, self.progress = title, progress
        self.requests = self.truncated = self.tokens_computed = 0
        self.tokens_unshared: int | None = 0
        self.gpu_seconds: float | None = 0.0 if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        """Progress over `count` requests: lm-eval tells its cache hook of every request that is answered."""
        with self.progress.task(f"lm-eval {self.title}", count) as task:
            self.set_cache_hook(_ProgressHook(task))
            yield
        self.requests += count

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """Add the time from the first to the last kernel of the block to gpu_seconds."""
        if self.gpu_seconds is None:
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        end.synchronize()
        self.gpu_seconds += begin.elapsed_time(end) / 1000

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        with self._counted(len(requests)):
            return self._loglikelihood_tokens(self._encoded([request.args for request in requests]))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        with self._counted(len(requests)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm: bool = False):
        self.tokens_unshared = None
        with self._counted(len(requests)), self._on_gpu():
            return super().generate_until(requests, disable_tqdm=True)

    def _encoded(self, pairs: list[tuple[str, str]]) -> list[tuple[tuple[str, str], np.ndarray, np.ndarray]]:
        """What lm-eval's `_encode_pair` gives for each (context, continuation), each string tokenized once and many
        in one call."""
        moved = []
        for context, continuation in pairs:
            spaces = len(context) - len(context.rstrip())
            cut = len(context) - spaces
            moved.append((context[:cut], context[cut:] + continuation) if context else ("", continuation))
        strings = {text for context, continuation in moved if context for text in (context, context + continuation)}
        tokens = self._tokenized(strings)
        encoded = []
        for pair, (context, continuation) in zip(pairs, moved, strict=True):
            if context:
                front, whole = tokens[context], tokens[context + continuation]
                encoded.append((pair, front, whole[len(front) :]))
            elif pair[0]:
                # A context of blanks alone is a context for lm-eval, too.
                encoded.append((pair, *map(np.array, self._encode_pair(*pair))))
            else:
                alone = np.array(self.tok_encode(continuation, add_special_tokens=False))
                # lm-eval's rule: the prefix token is the context unless the continuation begins with it.
                own = self.prefix_token_id == alone[0]
                encoded.append((pair, *((alone[:1], alone[1:]) if own else (np.array([self.prefix_token_id]), alone))))
        return encoded

    def _tokenized(self, strings: Iterable[str]) -> dict[str, np.ndarray]:
        """Token ids of each string, int32, as tok_encode gives them one by one."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        # tok_encode adds no second BOS to a string that begins with one.
        tokens = {text: np.array(self.tok_encode(text), dtype=np.int32) for text in strings if text.startswith(bos)}
        rest = sorted((text for text in strings if text not in tokens), key=len)
        for start in range(0, len(rest), _STRINGS):
            part = rest[start : start + _STRINGS]
            ids = self.tokenizer(part, return_attention_mask=False, verbose=False)["input_ids"]
            tokens |= {text: np.array(each, dtype=np.int32) for text, each in zip(part, ids, strict=True)}
        return tokens

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None):
        limit = self.max_length + 1
        sequences, targets = [], []
        for _, context, continuation in requests:
            if not len(continuation) or not len(context):
                raise ValueError(f"{self.title}: a continuation of {len(continuation)} tokens after {len(context)}")
            if len(continuation) > self.max_length:
                raise UnsupportedError(
                    f"{self.title}: an answer of {len(continuation)} tokens cannot be scored by a model of "
                    f"{self.max_length} positions, in lm-eval neither; leave the task out of accuracy.tasks"
                )
            # As lm-eval: what does not fit loses its beginning; the last token is predicted, never read.
            sequences.append(np.concatenate([context, continuation])[-limit:][:-1].astype(np.int32))
            targets.append(np.asarray(continuation, dtype=np.int32))
            self.truncated += len(context) + len(continuation) > limit
        if self.tokens_unshared is not None:
            # lm-eval's own adapter computes identical inputs once.
            self.tokens_unshared += sum(map(len, {each.tobytes() for each in sequences})) // 4
        if not self._takes_masks(max(map(len, sequences), default=0)):
            lists = [(pair, list(map(int, front)), list(map(int, back))) for pair, front, back in requests]
            return super()._loglikelihood_tokens(lists, disable_tqdm=True, override_bs=override_bs)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        dtype = self.model.get_input_embeddings().weight.dtype
        for rows in batches(pack(sequences, list(map(len, targets)), self.batch_tokens), self.batch_tokens):
            self.tokens_computed += len(rows) * len(rows[0])
            with self._on_gpu():
                scores = score(self.model, rows, targets, self.device, dtype)
            for index, value, greedy in scores:
                answers[index] = (value, greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def _takes_masks(self, longest: int) -> bool:
        """Whether a mask of ours may stand for the model's own: its attention takes one, and no layer's window is
        shorter than the longest sequence."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        return config._attn_implementation in ("sdpa", "eager") and (window is None or window >= longest)

    def _model_call(self, inps, attn_mask=None, labels=None):
        self.tokens_computed += inps.numel()
        with torch.no_grad(), self._on_gpu():
            return self.model(inps, use_cache=False).logits


class _ProgressHook:
    """Stands where lm-eval's request cache would be; it keeps nothing."""

    def __init__(self, task) -> None:
        self._task = task

    def add_partial(self, attr, request, response) -> None:
        self._task.advance()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No line for every truncated request (they are counted), and no pool of processes for the bootstrap: forking
    a process that holds a model on a GPU is asking for trouble."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
