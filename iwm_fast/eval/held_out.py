"""Held-out training images, to choose settings by: the test images choose nothing."""

from __future__ import annotations

import numpy as np

__all__ = ["held_out_rows"]

_SHARE = 0.1


def held_out_rows(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return a tenth of each class's rows, at least one of each class of two or more; bool (n,), deterministic."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            held[rows[: max(1, round(_SHARE * len(rows)))]] = True
    return held
