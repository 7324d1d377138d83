"""Bootstrap intervals, chance levels, and the protocol's fixed random choices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = [
    "Interval",
    "bootstrap_interval",
    "bootstrap_rows",
    "chance_hit",
    "chance_mrr",
    "evenly_spaced",
    "wilson_interval",
]

Interval = tuple[float, float]
RESAMPLES = 1000  # ends of a 95 % interval then vary between seeds by about a twentieth of its width
CONFIDENCE = 0.95
_BLOCK = 2**22  # random row numbers held at once: 32 MiB of int64


def bootstrap_interval(values: np.ndarray) -> Interval:
    """Return the percentile bootstrap of the mean of ``values`` (n,): 95 %, 1,000 resamples, a fixed seed.

    Raise ValueError for an empty array, or one with more dimensions.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values has shape {values.shape}; it must be (n,) with n at least 1")
    generator = np.random.default_rng(0)
    block = max(1, _BLOCK // len(values))
    means = np.concatenate(
        [
            values[generator.integers(0, len(values), (min(block, RESAMPLES - done), len(values)))].mean(axis=1)
            for done in range(0, RESAMPLES, block)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_rows(table: np.ndarray, figures: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile bootstrap intervals of functions of column means: lower and upper ends, float64 (F,) each.

    ``table``: (n, C), one independent observation per row. ``figures`` maps means (m, C) of m resamples to (m, F). 95
    %, 1,000 resamples, a fixed seed, as in `bootstrap_interval`. Raise ValueError for an empty table.
    """
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or not len(table):
        raise ValueError(f"table has shape {table.shape}; it must be (n, C) with n at least 1")
    generator = np.random.default_rng(0)
    # Sums of resampled rows are a matmul with how often each row was sampled.
    counts = generator.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES)
    values = figures(counts @ table / len(table))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def chance_mrr(bank: int) -> float:
    """Return the expected reciprocal rank of a uniformly random ranking of ``bank`` items: H_bank / bank."""
    return float((1.0 / np.arange(1, bank + 1)).sum() / bank)


def chance_hit(bank: int, k: int) -> float:
    """Return the expected H@k of a uniformly random ranking of ``bank`` items."""
    return min(k, bank) / bank


def evenly_spaced(count: int, total: int) -> np.ndarray:
    """Return ``count`` (at most ``total``) distinct indices, int64, ascending: middles of equal parts of a range."""
    count = min(count, total)
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // max(2 * count, 1)


def wilson_interval(successes: int, trials: int) -> Interval:
    """Return Wilson's 95 % score interval of a share (JASA 22, 1927).

    Raise ValueError unless 0 ≤ successes ≤ trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"successes is {successes} of {trials} trials; it must be from 0 to trials, and trials above 0"
        )
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
