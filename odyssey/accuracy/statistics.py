"""Paired statistics of two models on the same items: what a difference in a table is worth.

Both models answered the same questions, so most of the noise is common to them and the difference is known better than
either accuracy. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class PairedComparison:
    """A method compared with a reference on the same items.

    difference: method - reference, in the metric's unit. low, high: its 95 % bootstrap interval. items: pairs.
    p_value: McNemar's exact test; None where there is no right and wrong. lost, gained: items that only the reference,
    only the method has right. flips: share of items whose answer changed, from right to wrong, the other way, or from
    one wrong answer to another.
    """

    difference: float
    low: float
    high: float
    items: int
    p_value: float | None = None
    lost: int | None = None
    gained: int | None = None
    flips: float | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the difference may be chance: its interval holds 0, or McNemar's test does not reject at 5 %."""
        return self.low <= 0 <= self.high or (self.p_value is not None and self.p_value >= 1 - LEVEL)

    def scaled(self, factor: float) -> PairedComparison:
        """The same in another unit: a percentage for factor 100."""
        return replace(self, difference=self.difference * factor, low=self.low * factor, high=self.high * factor)


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test: under the hypothesis of no difference each of the lost + gained items
    went either way with probability 1/2 (McNemar 1947; the exact binomial form)."""
    if min(lost, gained) < 0:
        raise ValueError(f"lost={lost}, gained={gained}: counts cannot be negative")
    total, fewer = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    # Integers, because 2**-total underflows for the flips of a large task.
    tail = term = 1
    for count in range(fewer):
        term = term * (total - count) // (count + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def mean_interval(
    groups: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over groups of each group's mean.

    groups: per-item differences of each group (a task), resampled within the group.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        # Resampling items with replacement is a multinomial draw over their distinct values: few, for right and wrong.
        values, counts = np.unique(np.asarray(group, dtype=np.float64), return_counts=True)
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
        means += drawn @ values / counts.sum()
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_accuracy(
    reference: Mapping[str, Mapping[str, Mapping]], method: Mapping[str, Mapping[str, Mapping]], metric: str
) -> PairedComparison:
    """Compare two sets of per-item results (subtask -> document -> {"answer", metric}) by a metric of 0 and 1.

    Raises ValueError when the items differ, or when the metric is not 0 or 1 on each.
    """
    before, after = _aligned(reference, method, metric)
    answers = [
        reference[task][doc].get("answer") != method[task][doc].get("answer")
        for task in reference
        for doc in reference[task]
    ]
    lost, gained = int(np.sum(before > after)), int(np.sum(after > before))
    low, high = mean_interval([after - before])
    return PairedComparison(
        difference=float(np.mean(after - before)),
        low=low,
        high=high,
        items=len(before),
        p_value=mcnemar_exact(lost, gained),
        lost=lost,
        gained=gained,
        flips=float(np.mean(answers)),
    )


def compare_average(
    references: Sequence[Mapping[str, Mapping[str, Mapping]]],
    methods: Sequence[Mapping[str, Mapping[str, Mapping]]],
    metrics: Sequence[str],
) -> PairedComparison:
    """Compare the unweighted mean over tasks; each task is resampled on its own. Flips are the mean of the tasks'."""
    parts = [compare_accuracy(*each) for each in zip(references, methods, metrics, strict=True)]
    differences = []
    for reference, method, metric in zip(references, methods, metrics, strict=True):
        before, after = _aligned(reference, method, metric)
        differences.append(after - before)
    low, high = mean_interval(differences)
    return PairedComparison(
        difference=float(np.mean([part.difference for part in parts])),
        low=low,
        high=high,
        items=sum(part.items for part in parts),
        flips=float(np.mean([part.flips for part in parts])),
    )


def compare_perplexity(
    reference: Sequence[float],
    method: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> PairedComparison:
    """Compare perplexities from the mean negative log-likelihoods (nats) of the same windows: both models' windows are
    resampled together. Raises ValueError when their numbers differ."""
    before, after = np.asarray(reference, dtype=np.float64), np.asarray(method, dtype=np.float64)
    if before.shape != after.shape or before.size == 0:
        raise ValueError(f"windows cannot be paired: {before.size} and {after.size}")
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for index in range(resamples):
        drawn = generator.integers(len(before), size=len(before))
        differences[index] = math.exp(after[drawn].mean()) - math.exp(before[drawn].mean())
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return PairedComparison(
        difference=math.exp(after.mean()) - math.exp(before.mean()), low=float(low), high=float(high), items=len(before)
    )


def _aligned(reference: Mapping, method: Mapping, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The metric of both on the same items in the same order."""
    if {task: set(items) for task, items in reference.items()} != {task: set(items) for task, items in method.items()}:
        raise ValueError("per-item results cannot be paired: they are of different items")
    order = [(task, doc) for task, items in reference.items() for doc in items]
    pair = tuple(np.array([found[task][doc][metric] for task, doc in order], float) for found in (reference, method))
    if not all(np.isin(values, (0.0, 1.0)).all() for values in pair):
        raise ValueError(f"{metric}: not right or wrong on every item")
    return pair
