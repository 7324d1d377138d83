"""Names in the order of `sorted`, in a temporary file: a hundred million of them take little memory."""

from __future__ import annotations

import heapq
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast, overload

__all__ = ["SortedNames"]

_HELD = 200_000  # names that are sorted in memory at a time, 20 MB
_BLOCK = 1 << 14  # bytes read at once of each sorted part: of 1e8 names there are 500
_STRIDE = 64  # names between the offsets that are kept
_ENCODING = ("utf-8", "surrogateescape")  # names of files are bytes, and need not be UTF-8
_TOLD_EVERY = 100_000


class SortedNames(Sequence[str]):
    """The given names, sorted. folder: where the temporary file is, which has no name and goes with this object.

    It is a file of texts that end in a zero byte, with the offset of every 64th in memory: 0.125 bytes per name. Parts
    of 200,000 names are sorted in memory, then merged. tell: called now and then with the number of names so far.
    """

    def __init__(self, names: Iterable[str], folder: Path, tell: Callable[[int], None] | None = None) -> None:
        self._folder = folder
        self._file = _unnamed(folder)
        with _unnamed(folder) as spool:
            parts = _sorted_parts(names, spool, tell)
            self._keep(parts[0] if len(parts) == 1 else heapq.merge(*parts))

    def only(self, wanted: Callable[[str], bool]) -> SortedNames:
        """Return those of the names that `wanted` is true of."""
        found = SortedNames((), self._folder)
        found._keep(filter(wanted, self))
        return found

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return _texts(self._file, 0, self._size)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(f"name {place} of {self._count}")
        block, inside = divmod(place % self._count, _STRIDE)
        begin = self._starts[block]
        end = self._starts[block + 1] if block + 1 < len(self._starts) else self._size
        raw = os.pread(self._file.fileno(), end - begin, begin)
        return raw.split(b"\0", inside + 1)[inside].decode(*_ENCODING)

    def _keep(self, names: Iterable[str]) -> None:
        self._starts = array("q")
        self._count = self._size = 0
        for name in names:
            if not self._count % _STRIDE:
                self._starts.append(self._size)
            self._size += self._file.write(name.encode(*_ENCODING) + b"\0")
            self._count += 1
        self._file.flush()


def _unnamed(folder: Path) -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile(dir=folder))


def _sorted_parts(names: Iterable[str], spool: BinaryIO, tell: Callable[[int], None] | None) -> list[Iterator[str]]:
    """Write sorted parts to the spool; return them."""
    spans = []
    held: list[str] = []
    size = 0

    def spill() -> None:
        nonlocal size
        held.sort()
        begin = size
        for name in held:
            size += spool.write(name.encode(*_ENCODING) + b"\0")
        spans.append((begin, size))
        held.clear()

    for count, name in enumerate(names, 1):
        held.append(name)
        if len(held) == _HELD:
            spill()
        if tell is not None and not count % _TOLD_EVERY:
            tell(count)
    if not spans:  # few
        return [iter(sorted(held))]
    spill()
    spool.flush()
    return [_texts(spool, *span) for span in spans]


def _texts(file: BinaryIO, begin: int, end: int) -> Iterator[str]:
    """The texts in a part of a file."""
    left = b""
    while begin < end:
        piece = os.pread(file.fileno(), min(_BLOCK, end - begin), begin)
        begin += len(piece)
        *whole, left = (left + piece).split(b"\0")
        for name in whole:
            yield name.decode(*_ENCODING)
