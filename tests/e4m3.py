"""Rounding to e4m3 by a table in NumPy, and rows of values to round."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Every e4m3 value from 0 to 448 in the order of its code: below 2⁻⁶ steps of 2⁻⁹, above eight per power of two.
MAGNITUDES = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])


def e4m3(x: Floats) -> Floats:
    """Return the nearest e4m3 value of |x| ≤ 448; of two equally near, the one with an even code."""
    above = np.searchsorted(MAGNITUDES, np.abs(x)).clip(1, 126)
    low, high = MAGNITUDES[above - 1], MAGNITUDES[above]
    up = np.abs(x) - low > high - np.abs(x)
    tie = np.abs(x) - low == high - np.abs(x)
    nearest: Floats = np.where(up | (tie & (above % 2 == 0)), high, low)
    return np.copysign(nearest, x)


def rounded(x: Floats) -> Floats:
    """Return each row rounded to e4m3, scaled by the least power of two that takes its maximum to 448 or less."""
    rows = []
    for row in x:
        fraction, exponent = math.frexp(np.abs(row).max() / 448)
        scale = 2.0 ** max(exponent - (fraction == 0.5), -126)
        rows.append(e4m3(row / scale) * scale)
    return np.array(rows).reshape(x.shape)


def draw(rows: int, columns: int, seed: int, sizes: float, dtype: torch.dtype) -> torch.Tensor:
    """Return normal values whose rows differ in scale by up to 10 to ± `sizes`, some far smaller than their row."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (sizes * (2 * torch.rand(rows, 1, generator=generator) - 1))
    uneven = 10 ** (-6 * torch.rand(rows, columns, generator=generator) ** 4)
    return (torch.randn(rows, columns, generator=generator) * size * uneven).to(dtype)
