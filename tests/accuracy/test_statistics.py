"""Paired statistics against independent references: rational binomial tails, plain resampling, normal theory."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from odyssey.accuracy.statistics import (
    PairedComparison,
    compare_accuracy,
    compare_average,
    compare_perplexity,
    mcnemar_exact,
    mean_interval,
)


def items_of(right, answers=None, task="t"):
    answers = right if answers is None else answers
    return {task: {str(n): {"answer": a, "acc": float(r)} for n, (r, a) in enumerate(zip(right, answers, strict=True))}}


@pytest.mark.parametrize("counts", [(0, 0), (5, 0), (0, 6), (3, 9), (40, 41), (55, 120), (300, 301), (2000, 2300)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    lost, gained = counts
    # The definition, in rational numbers: twice the smaller tail of Binomial(lost + gained, 1/2).
    tail = sum(Fraction(math.comb(lost + gained, k)) for k in range(min(counts) + 1)) / 2 ** (lost + gained)
    assert mcnemar_exact(lost, gained) == pytest.approx(float(min(1, 2 * tail)), rel=1e-12)


def test_mcnemar_has_the_textbook_value():
    # 5 of 5 discordant pairs on one side: 2 / 32.
    assert mcnemar_exact(5, 0) == 0.0625
    with pytest.raises(ValueError, match="lost=-1"):
        mcnemar_exact(-1, 3)


def test_the_interval_is_that_of_plain_resampling():
    generator = np.random.default_rng(1)
    differences = generator.choice([-1.0, 0.0, 1.0], size=400, p=[0.12, 0.8, 0.08])
    means = [generator.choice(differences, size=400).mean() for _ in range(10_000)]
    assert mean_interval([differences]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.003)
    # Normal theory, which holds for 400 items.
    half = 1.96 * differences.std() / 20
    assert mean_interval([differences]) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=0.004
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(400):
        sample = generator.choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.75, 0.15])
        low, high = mean_interval([sample], resamples=1000, seed=seed)
        covered += low <= 0.05 <= high
    assert 0.915 <= covered / 400 <= 0.98


def test_an_average_is_resampled_within_its_tasks():
    # Tasks that differ, with no noise inside: the mean over tasks is certain although the items differ.
    assert mean_interval([np.ones(50), np.zeros(10)]) == (0.5, 0.5)
    reference = [items_of([0] * 50), items_of([1] * 10)]
    method = [items_of([1] * 50), items_of([1] * 10)]
    average = compare_average(reference, method, ["acc", "acc"])
    assert (average.difference, average.low, average.high) == (0.5, 0.5, 0.5)
    assert (average.items, average.flips, average.p_value) == (60, 0.5, None)
    assert not average.within_noise


def test_a_comparison_counts_flips_of_every_kind():
    reference = items_of([1, 1, 0, 0, 1, 0], answers=[2, 1, 0, 3, 1, 2])
    method = items_of([1, 0, 1, 0, 1, 0], answers=[2, 3, 1, 2, 1, 2])
    found = compare_accuracy(reference, method, "acc")
    assert (found.lost, found.gained, found.items) == (1, 1, 6)
    assert found.flips == pytest.approx(3 / 6)  # one lost, one gained, one from wrong to wrong
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.within_noise


def test_a_clear_loss_is_outside_the_noise():
    right = np.arange(1000) % 2 == 0
    worse = right & (np.arange(1000) % 10 != 0)
    found = compare_accuracy(items_of(right), items_of(worse), "acc")
    assert found.difference == pytest.approx(-0.1)
    assert -0.13 < found.low < -0.1 < found.high < -0.07
    assert not found.within_noise
    assert compare_accuracy(items_of(worse), items_of(right), "acc").difference == pytest.approx(0.1)


def test_either_test_calls_it_noise():
    assert PairedComparison(0.1, 0.01, 0.2, 9, p_value=0.06).within_noise
    assert PairedComparison(0.1, -0.01, 0.2, 9, p_value=0.01).within_noise
    assert not PairedComparison(0.1, 0.01, 0.2, 9, p_value=0.04).within_noise


def test_groups_are_paired_subtask_by_subtask():
    reference = items_of([1, 0], task="a") | items_of([1], task="b")
    method = items_of([1], task="b") | items_of([1, 1], task="a")
    assert compare_accuracy(reference, method, "acc").gained == 1


@pytest.mark.parametrize(
    ("method", "metric", "message"),
    [
        (items_of([1, 0, 1]), "acc", "different items"),
        (items_of([1, 0], task="u"), "acc", "different items"),
        (items_of([0.5, 0]), "acc", "acc: not right or wrong on every item"),
    ],
)
def test_what_cannot_be_paired(method, metric, message):
    with pytest.raises(ValueError, match=message):
        compare_accuracy(items_of([1, 0]), method, metric)


def test_perplexities_share_their_windows():
    """The windows' own spread is common to both and drops out; against the delta method."""
    generator = np.random.default_rng(5)
    reference = generator.normal(3.5, 0.3, 200)
    method = reference + generator.normal(0.02, 0.01, 200)
    found = compare_perplexity(reference, method)
    assert found.difference == pytest.approx(math.exp(method.mean()) - math.exp(reference.mean()))
    before, after = math.exp(reference.mean()), math.exp(method.mean())
    # d(exp a - exp b) for the mean over windows of (exp a) * a_i - (exp b) * b_i.
    half = 1.96 * np.std(after * method - before * reference) / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.1 * half)
    assert not found.within_noise
    alone = 1.96 * before * reference.std() / math.sqrt(200)
    assert half < alone / 10
    assert (found.items, found.p_value, found.flips) == (200, None, None)
    with pytest.raises(ValueError, match="windows cannot be paired: 200 and 199"):
        compare_perplexity(reference, method[1:])
