"""Medians and ratios of medians, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "Estimate", "median_of", "ratio_of"]

CONFIDENCE = 0.99
_RESAMPLES = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 99 % interval."""

    value: float
    low: float
    high: float


def median_of(samples: Sequence[float]) -> Estimate:
    """Return the median, with an interval by block bootstrap. Raise ValueError for no samples."""
    return _estimate(float(np.median(samples)), _medians(_checked(samples), 0))


def ratio_of(numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False) -> Estimate:
    """Return the median of one over the median of the other, with an interval by block bootstrap.

    Consecutive measurements are not independent, so blocks of ⌈√n⌉ neighbours are resampled. `paired`: sample i of both
    was measured together, and both are resampled together.
    """
    above, below = _checked(numerator), _checked(denominator)
    if paired and len(above) != len(below):
        raise ValueError(f"paired samples are {len(above)} and {len(below)}; they must be equally many")
    # The same seed samples the same blocks for both, which pairs them.
    resampled = _medians(above, 0) / _medians(below, 0 if paired else 1)
    return _estimate(float(np.median(above) / np.median(below)), resampled)


def _checked(samples: Sequence[float]) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"samples have shape {values.shape}; they must be (n,), n at least 1, all finite")
    return values


def _medians(values: Floats, seed: int) -> Floats:
    """Return the medians of resampled series, (2000,): n samples each, in blocks that wrap around the end."""
    count = len(values)
    length = int(np.ceil(np.sqrt(count)))
    starts = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, -(-count // length)))
    rows = (starts[:, :, None] + np.arange(length)) % count
    found: Floats = np.median(values[rows.reshape(_RESAMPLES, -1)[:, :count]], axis=1)
    return found


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
