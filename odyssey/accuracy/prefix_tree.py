"""Scoring many continuations in few tokens: sequences that begin alike are computed once.

The sequences of a task are sorted, neighbours that share a beginning are put into one row as the branches of a tree
(the choices of a question after its context, the questions of a subject after its few-shot examples), and a mask lets
every token attend to its own branch only. Positions count along the branch. Up to the rounding of attention's sums this
is the computation of every sequence on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

# A row that is longer than its longest sequence saves less and less while its attention grows with the square: at most
# so many tokens, and for longer sequences so many times theirs.
ROW_TOKENS = 4096
ROW_SEQUENCES = 4
# Sequences share a row when at least this part of one is common with its neighbour.
MIN_SHARED = 0.25
# A batch ends where the next row is shorter than this part of its longest: the rest would be padding.
MIN_FILLED = 0.8
# Rows of logits that are turned into float32 log-probabilities at a time.
_LOGIT_ROWS = 2048


@dataclass(frozen=True)
class Row:
    """A tree of tokens in depth-first order.

    tokens, positions: [n] ids and depths. ends: [n], one past the last descendant of each token. members: for each
    sequence its index and, per scored token, the node whose logits predict it.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    members: list[tuple[int, np.ndarray]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


class _Builder:
    """A row that grows by one branch after another, in sorted order."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.ends = np.empty(0, dtype=np.int32)
        self.size = 0
        self.path = np.empty(0, dtype=np.int64)
        self.members: list[tuple[int, np.ndarray]] = []

    def add(self, sequence: np.ndarray, shared: int, index: int, scored: int) -> None:
        new = np.arange(self.size, self.size + len(sequence) - shared)
        self.path = np.concatenate([self.path[:shared], new])
        self.tokens.append(sequence[shared:])
        self.positions.append(np.arange(shared, len(sequence)))
        self.size += len(new)
        self.ends = np.concatenate([self.ends, np.empty(len(new), dtype=np.int32)])
        # All nodes of the path have the newest node as their last descendant so far.
        self.ends[self.path] = self.size
        self.members.append((index, self.path[len(self.path) - scored :]))

    def row(self) -> Row:
        return Row(np.concatenate(self.tokens), np.concatenate(self.positions), self.ends, self.members)


def pack(sequences: Sequence[np.ndarray], scored: Sequence[int], max_tokens: int = 2**31) -> list[Row]:
    """Arrange token sequences (int arrays, each at least one token) in rows, longest row first.

    scored: how many of the last tokens of each sequence have their logits used. max_tokens: the most tokens of a row
    that holds more than one sequence.
    """
    longest = max(map(len, sequences), default=0)
    row_tokens = min(max_tokens, max(ROW_TOKENS, ROW_SEQUENCES * longest))
    # Big-endian bytes sort as the token ids do, at the speed of memcmp.
    keys = [np.asarray(sequence, dtype=">u4").tobytes() for sequence in sequences]
    rows: list[Row] = []
    builder: _Builder | None = None
    previous = np.empty(0, dtype=np.int64)
    for index in sorted(range(len(sequences)), key=keys.__getitem__):
        sequence = np.asarray(sequences[index])
        shared = _common_prefix(previous, sequence)
        fits = builder is not None and builder.size + len(sequence) - shared <= row_tokens
        if not fits or shared < MIN_SHARED * len(sequence):
            if builder is not None:
                rows.append(builder.row())
            builder, shared = _Builder(), 0
        builder.add(sequence, shared, index, scored[index])
        previous = sequence
    if builder is not None:
        rows.append(builder.row())
    return sorted(rows, key=len, reverse=True)


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows (longest first) that padded to the first one are at most `max_tokens` together; at least one."""
    batch: list[Row] = []
    for row in rows:
        if batch and ((len(batch) + 1) * len(batch[0]) > max_tokens or len(row) < MIN_FILLED * len(batch[0])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def branch_mask(ends: torch.Tensor) -> torch.Tensor:
    """Which token sees which: bool [rows, 1, n, n] from `ends` [rows, n]; token i sees j when j is i or before it on
    its branch."""
    index = torch.arange(ends.shape[1], device=ends.device)
    return ((index[:, None] >= index[None, :]) & (index[None, :, None] < ends[:, None, :]))[:, None]


@torch.inference_mode()
def score(
    model: nn.Module, rows: list[Row], targets: Sequence[np.ndarray], device: torch.device, dtype: torch.dtype
) -> list[tuple[int, float, bool]]:
    """One forward pass: (sequence's index, log-likelihood of its targets, whether each is the most likely token).

    targets: by sequence index, the token ids that the scored nodes predict. dtype: of the model's activations.
    Log-softmax is in float32, the sum over a continuation in float64.
    """
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    # A padding token is a branch of its own.
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.from_numpy(row.tokens.astype(np.int64))
        positions[number, : len(row)] = torch.from_numpy(row.positions.astype(np.int64))
        ends[number, : len(row)] = torch.from_numpy(row.ends.astype(np.int64))
    members = [(number, index, nodes) for number, row in enumerate(rows) for index, nodes in row.members]
    nodes = np.concatenate([nodes for _, _, nodes in members])
    kept = np.unique(nodes)
    seen = branch_mask(ends.to(device))
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    logits = model(
        tokens.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False,
        logits_to_keep=torch.from_numpy(kept).to(device),
    ).logits  # fmt: skip
    number = torch.from_numpy(np.concatenate([np.full(len(nodes), number) for number, _, nodes in members])).to(device)
    column = torch.from_numpy(np.searchsorted(kept, nodes)).to(device)
    wanted = torch.from_numpy(np.concatenate([targets[index] for _, index, _ in members]).astype(np.int64)).to(device)
    values, equal = [], []
    for start in range(0, len(wanted), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        log_probabilities = nn.functional.log_softmax(logits[number[part], column[part]], dim=-1, dtype=torch.float32)
        values.append(log_probabilities.gather(1, wanted[part, None])[:, 0])
        equal.append(log_probabilities.argmax(dim=-1) == wanted[part])
    borders = np.cumsum([len(nodes) for _, _, nodes in members])[:-1]
    sums = [part.sum() for part in np.split(torch.cat(values).double().cpu().numpy(), borders)]
    greedy = [bool(part.all()) for part in np.split(torch.cat(equal).cpu().numpy(), borders)]
    return [(index, float(total), exact) for (_, index, _), total, exact in zip(members, sums, greedy, strict=True)]
