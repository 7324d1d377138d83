"""Which gradients share a message: the engine sends by it (stage 0), and the plan counts by it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BUCKET_BYTES", "buckets_of"]

# Of one message at stage 0: long enough for a link's full rate, and a large model has dozens of them to hide.
BUCKET_BYTES = 50_000_000


def buckets_of(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of `sizes` from the last to the first, in runs whose sum is at most `most`, or of one larger size."""
    found: list[list[int]] = []
    filled = 0
    for i in reversed(range(len(sizes))):
        if not found or filled + sizes[i] > most:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += sizes[i]
    return found
