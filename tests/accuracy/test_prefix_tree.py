"""Sequences packed into trees: every one is intact, and its likelihood is that of the sequence on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from odyssey.accuracy.prefix_tree import MIN_FILLED, batches, branch_mask, pack, score
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model

# Few different tokens give many shared beginnings, repeated sequences and sequences that begin another.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30)


def _seen(row) -> np.ndarray:
    return branch_mask(torch.from_numpy(row.ends.astype(np.int64))[None])[0, 0].numpy()


@settings(deadline=None, max_examples=200)
@given(SEQUENCES, st.integers(1, 60))
def test_each_branch_is_its_sequence(sequences, max_tokens):
    arrays = [np.array(sequence, dtype=np.int32) for sequence in sequences]
    scored = [1 + index % len(sequence) for index, sequence in enumerate(sequences)]
    rows = pack(arrays, scored, max_tokens)
    found = {}
    for row in rows:
        assert len(row) == len(row.positions) == len(row.ends)
        assert len(row.members) == 1 or len(row) <= max_tokens
        seen = _seen(row)
        for index, nodes in row.members:
            branch = np.flatnonzero(seen[nodes[-1]])
            assert row.tokens[branch].tolist() == sequences[index]
            assert row.positions[branch].tolist() == list(range(len(branch)))
            assert nodes.tolist() == branch[-scored[index] :].tolist()
            found[index] = True
    assert len(found) == len(sequences)
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
    assert sum(map(len, rows)) <= sum(map(len, sequences))


def test_a_common_beginning_is_held_once():
    context = list(range(100, 130))
    sequences = [np.array([*context, choice, 7, 8]) for choice in (3, 1, 2, 1)]
    (row,) = pack(sequences, [2] * 4)
    assert len(row) == 30 + 3 * 3  # two choices are the same
    assert pack([np.array([9, 8]), np.array([1, 2])], [1, 1])[0].members[0][0] == 1
    assert len(pack([np.array([9, 8]), np.array([1, 2])], [1, 1])) == 2


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 40))
def test_batches_hold_every_row_with_little_padding(sequences, max_tokens):
    rows = pack([np.array(sequence) for sequence in sequences], [1] * len(sequences), 24)
    taken = list(batches(rows, max_tokens))
    assert [row for batch in taken for row in batch] == rows
    for batch in taken:
        assert len(batch) == 1 or len(batch) * len(batch[0]) <= max_tokens
        assert min(map(len, batch)) >= MIN_FILLED * len(batch[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32, weight_std=0.3)
    return load_model(resolve_model("local", path=str(directory))).double()


def test_likelihoods_are_those_of_each_sequence_alone(model):
    """In float64, where the order of attention's sums hardly matters, against NumPy's log-softmax."""
    generator = np.random.default_rng(3)
    header = generator.integers(3, 60, 40)
    sequences, targets = [], []
    for _ in range(6):
        question = np.concatenate([header, generator.integers(3, 60, generator.integers(1, 12))])
        for _ in range(4):
            answer = generator.integers(3, 60, generator.integers(1, 6))
            sequences.append(np.concatenate([question, answer[:-1]]))
            targets.append(answer)
    sequences.append(generator.integers(3, 60, 9))
    with torch.no_grad():
        best = model(torch.from_numpy(sequences[-1])[None]).logits[0, -3:].argmax(-1).numpy()
    # The likeliest tokens, and all of them but the last.
    sequences.append(sequences[-1])
    targets += [best, np.concatenate([best[:-1], [(best[-1] + 1) % 60]])]
    rows = pack(sequences, list(map(len, targets)), 90)
    assert len(rows) > 3
    found = {}
    for batch in batches(rows, 200):
        for index, value, greedy in score(model, batch, targets, torch.device("cpu"), torch.float64):
            found[index] = (value, greedy)
    for index, (sequence, answer) in enumerate(zip(sequences, targets, strict=True)):
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence)[None]).logits[0, -len(answer) :].numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        value, greedy = found[index]
        assert value == pytest.approx(log_probabilities[np.arange(len(answer)), answer].sum(), rel=1e-6)
        assert greedy == (logits.argmax(-1) == answer).all()
    assert [found[len(sequences) - 2][1], found[len(sequences) - 1][1]] == [True, False]
