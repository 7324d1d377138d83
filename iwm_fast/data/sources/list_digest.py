"""Checksums of a list of samples by their names and sizes, computed while the list passes by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ListDigest", "ListSums"]

# Parts of the list with their own checksums, which locate a difference.
_PARTS = 256
_SUM_DIGITS = 8


@dataclass(frozen=True)
class ListSums:
    """Sums of a whole list: bytes of all samples; SHA-256 of names and sizes, and of names alone; checksums of the
    names and the sizes of its parts, of ``part`` samples each.
    """

    bytes: int
    digest: str
    names_digest: str
    part: int
    names: tuple[str, ...]
    sizes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: dict[str, Any]) -> ListSums:
        """Invert `document`."""
        return cls(**{**document, "names": tuple(document["names"]), "sizes": tuple(document["sizes"])})


class ListDigest:
    """The sums of a list of `samples` samples, added in order, any number at a time; memory: one part's names."""

    def __init__(self, samples: int) -> None:
        self._part = max(1, -(-samples // _PARTS))
        self._whole, self._names = hashlib.sha256(), hashlib.sha256()
        self._bytes = 0
        self._waiting: tuple[list[bytes], list[int]] = ([], [])
        self._sums: tuple[list[str], list[str]] = ([], [])

    def add(self, names: Sequence[bytes], sizes: Sequence[int]) -> None:
        """Add the next samples: names below the root, and bytes, -1 for a missing one."""
        if names:
            self._names.update(b"\0".join(names) + b"\0")
        self._bytes += sum(sizes) + sizes.count(-1)
        waiting_names, waiting_sizes = self._waiting
        waiting_names += names
        waiting_sizes += sizes
        while len(waiting_names) >= self._part:
            self._flush(waiting_names[: self._part], waiting_sizes[: self._part])
            del waiting_names[: self._part], waiting_sizes[: self._part]

    def update(self, column: bytes) -> None:
        """Add something else of the whole list to its digest, after all samples."""
        self._end()
        self._whole.update(column)

    def sums(self) -> ListSums:
        """Return the sums of what was added."""
        self._end()
        names, sizes = (tuple(sums) for sums in self._sums)
        return ListSums(self._bytes, self._whole.hexdigest(), self._names.hexdigest(), self._part, names, sizes)

    def _end(self) -> None:
        if self._waiting[0]:
            self._flush(*self._waiting)
            self._waiting = ([], [])

    def _flush(self, names: list[bytes], sizes: list[int]) -> None:
        for sums, lines in zip(self._sums, (names, [b"%d" % size for size in sizes]), strict=True):
            text = b"\0".join(lines)
            self._whole.update(text + b"\n")
            sums.append(hashlib.sha256(text).hexdigest()[:_SUM_DIGITS])
