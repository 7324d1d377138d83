"""Compare each of many values with the others."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["medians_of_others"]


def medians_of_others(values: Sequence[float]) -> list[float]:
    """Return for each of at least two values the median of the others, from one sort of all."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranked = [values[place] for place in order]
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # the middle of the others
    found = [0.0] * len(values)
    for position, place in enumerate(order):
        middle = [ranked[k if k < position else k + 1] for k in (low, high)]
        found[place] = sum(middle) / 2
    return found
