"""The end of a greedy decoding step: the likeliest token of every sequence and its length one longer, in one kernel."""

from __future__ import annotations

import torch

from odyssey.engine.gemv import overlaps, triton

_BLOCK, _WARPS = 8192, 8

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _greedy_kernel(
        logits_pointer, tokens_pointer, lengths_pointer, vocabulary, overlap: tl.constexpr, block: tl.constexpr
    ):
        row = tl.program_id(0)
        columns = tl.arange(0, block)
        best = tl.full((block,), float("-inf"), dtype=tl.float32)
        best_column = tl.zeros((block,), dtype=tl.int32)
        if overlap:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        pointers = logits_pointer + row.to(tl.int64) * vocabulary + columns
        for begin in range(0, vocabulary, block):
            inside = begin + columns < vocabulary
            value = tl.load(pointers + begin, mask=inside, other=float("-inf")).to(tl.float32)
            better = value > best
            best = tl.where(better, value, best)
            best_column = tl.where(better, begin + columns, best_column)
        # Of equal logits the first, as torch.argmax has it on a CPU.
        first = tl.min(tl.where(best == tl.max(best, axis=0), best_column, vocabulary), axis=0)
        tl.store(tokens_pointer + row, first.to(tl.int64))
        tl.store(lengths_pointer + row, tl.load(lengths_pointer + row) + 1)


def finish_step(logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
    """tokens[b] = argmax of logits[b], lengths[b] += 1.

    logits: [B, vocab_size], contiguous. tokens: int64 [B], lengths: int32 [B], both written.
    """
    if triton is None or not logits.is_cuda or not logits.is_contiguous():
        torch.argmax(logits, dim=-1, out=tokens)
        lengths += 1
        return
    overlap = overlaps(logits.device)
    _greedy_kernel[(logits.shape[0],)](
        logits, tokens, lengths, logits.shape[1], overlap=overlap, block=_BLOCK, num_warps=_WARPS, launch_pdl=overlap
    )
