"""What the machine can do, as far as it was measured, and the least time that it allows for a piece of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iwm_fast.measure.operations import Work

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """operations_per_s: of the fastest measured matmul. copies: (bytes moved, bytes/s), ascending.

    A copy of 64 KiB stays in a cache and may be 20 times as fast as one of 64 MiB, so a call is compared with copies of
    at least its size and the next smaller one.
    """

    operations_per_s: float
    copies: tuple[tuple[int, float], ...]

    @staticmethod
    def of(ceilings: Mapping[str, Any]) -> Limits:
        """Of what `iwm_fast.measure.timing.ceilings` measured."""
        copies: Sequence[Mapping[str, Any]] = ceilings["copies"]
        rates = sorted((int(one["bytes"]), float(one["bytes_per_s"])) for one in copies)
        return Limits(float(ceilings["matmul_best_flops_per_s"]), tuple(rates))

    def bytes_per_s(self, moved: int) -> float:
        """The fastest that so many bytes can be moved."""
        below = sum(size <= moved for size, _ in self.copies)
        return max(rate for _, rate in self.copies[max(0, below - 1) :])

    def seconds(self, work: Work) -> float:
        """The least time for the work's calls one after another: of each, its operations or its bytes."""
        return sum(
            count * max(operations / self.operations_per_s, size / self.bytes_per_s(size))
            for (operations, size), count in work.sizes.items()
        )

    def share(self, seconds: float, work: Work) -> float | None:
        """That time over the seconds taken; None where there is no work, no time, or less time than the limits allow.

        Then they are no limits: the data lay nearer than any copy's, say.
        """
        least = self.seconds(work)
        return least / seconds if 0 < least <= seconds else None
