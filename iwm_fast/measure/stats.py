"""Medians, ratios of medians, and how far noise alone could have moved them."""

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
    """A value with the ends of its 99 % interval."""

    value: float
    low: float
    high: float


def median_of(samples: Sequence[float]) -> Estimate:
    """The median, by a bootstrap over blocks of neighbouring samples. ValueError where there are none."""
    return _estimate(float(np.median(samples)), _medians(_checked(samples), 0))


def ratio_of(numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False) -> Estimate:
    """Return the median of one over the median of the other, with an interval by block bootstrap.

    Consecutive measurements are not independent: what slows one slows the next. So whole blocks of neighbours are
    resampled, ⌈√n⌉ long. `paired`: sample i of both was taken side by side, and both are resampled together.
    """
    above, below = _checked(numerator), _checked(denominator)
    if paired and len(above) != len(below):
        raise ValueError(f"paired samples are {len(above)} and {len(below)}; they must be as many")
    # The same seed draws the same blocks for both, which is what pairs them.
    drawn = _medians(above, 0) / _medians(below, 0 if paired else 1)
    return _estimate(float(np.median(above) / np.median(below)), drawn)


def _checked(samples: Sequence[float]) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"samples have shape {values.shape}; they must be (n,), n at least 1, all finite")
    return values


def _medians(values: Floats, seed: int) -> Floats:
    """Medians of resampled series, (2000,): blocks that may run over the end, as many as make n."""
    count = len(values)
    length = int(np.ceil(np.sqrt(count)))
    starts = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, -(-count // length)))
    rows = (starts[:, :, None] + np.arange(length)) % count
    found: Floats = np.median(values[rows.reshape(_RESAMPLES, -1)[:, :count]], axis=1)
    return found


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
