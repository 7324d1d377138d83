"""Read a manifest's text once, from the first row to the last, and check every row; a million take two seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.verdicts import RULES
from iwm_fast.data.sources.list_digest import ListDigest, ListSums
from iwm_fast.data.sources.manifest_text import CHECK, ManifestText, not_whole
from iwm_fast.data.sources.names import unescape
from iwm_fast.long_work import note_progress

__all__ = ["BY_PILLOW", "STRIDE", "Scan", "scan"]

STRIDE = 32  # rows between the offsets that are kept
BY_PILLOW = 9  # the largest value of the column check

_TAB, _LINE, _ZERO = 9, 10, 48
_ENCODING = ("utf-8", "surrogateescape")

Offsets = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scan:
    """starts: offset of every STRIDE-th row, and of the end. places: (name, first row, last row) of each folder with
    images or file with samples. files: of samples, sorted. sums: of the list. unchecked: rows without a verdict by
    these rules.
    """

    starts: Offsets
    places: list[tuple[str, int, int]]
    files: tuple[str, ...]
    sums: ListSums
    unchecked: int


def scan(text: ManifestText, tell: Callable[[int], None] = lambda _rows: None) -> Scan:
    """Read and check all rows. Raises UserError where there are not as many as the first line says, or one is wrong.

    tell: called with the number of rows so far, every 4 MB.
    """
    try:
        return _scan(text, tell)
    except ValueError as error:
        raise not_whole(text.shown, error) from error


def _scan(text: ManifestText, tell: Callable[[int], None]) -> Scan:
    header = text.header
    digest = ListDigest(header.samples)
    own_files = header.source == "folder"
    spans: dict[bytes, list[int]] = {}
    starts: list[Offsets] = []
    row, checked = 0, 0
    for offset, chunk in text.chunks():
        columns = _Columns(chunk, header.columns, row)
        starts.append(offset + columns.begins[-row % STRIDE :: STRIDE])
        names = columns.texts("path")
        digest.add(names, [0] * len(names) if header.source == "tfrecord" else columns.numbers("bytes", 10).tolist())
        columns.numbers("crc32c", 16)
        columns.numbers("offset", 10)
        checked += _checked(columns) if header.check == RULES else 0
        places = [name.rpartition(b"/")[0] for name in names] if own_files else columns.texts("file")
        for place, group in groupby(places):
            count = sum(1 for _ in group)
            spans.setdefault(place, [row, row])[1] = row + count - 1
            row += count
        note_progress()
        tell(row)
    if row != header.samples:
        raise ValueError(f"it has {row} rows, and its first line says {header.samples}")
    named = [(place.decode(*_ENCODING), first, end) for place, (first, end) in spans.items()]
    starts.append(np.array([text.size], np.int64))
    files = () if own_files else tuple(sorted(name for name, _, _ in named))
    return Scan(np.concatenate(starts), named, files, digest.sums(), header.samples - checked)


def _checked(columns: _Columns) -> int:
    """The number of rows with a verdict; their values are checked."""
    found = columns.numbers(CHECK, 10)
    if np.any(found > BY_PILLOW):
        raise ValueError(f"a value of check is above {BY_PILLOW}")
    columns.numbers("width", 10)
    columns.numbers("height", 10)
    return int(np.count_nonzero(found))


class _Columns:
    """The columns of a chunk of whole rows. begins: offset of each row in it."""

    def __init__(self, chunk: bytes, columns: tuple[str, ...], row: int) -> None:
        self._chunk, self._letters = chunk, np.frombuffer(chunk, np.uint8)
        lines = np.flatnonzero(self._letters == _LINE)
        tabs = np.flatnonzero(self._letters == _TAB)
        self.begins: Offsets = np.concatenate([np.zeros(1, np.int64), lines[:-1] + 1])
        if len(tabs) != len(lines) * (len(columns) - 1):
            raise ValueError(f"a row after line {row + 2} has the wrong number of columns")
        inner = tabs.reshape(len(lines), -1)
        starts = np.concatenate([self.begins[:, None], inner + 1], axis=1)
        ends = np.concatenate([inner, lines[:, None]], axis=1)
        if np.any(ends < starts):
            raise ValueError(f"a row after line {row + 2} has the wrong number of columns")
        self._spans = {name: (starts[:, at], ends[:, at]) for at, name in enumerate(columns)}
        self._escaped = b"\\" in chunk

    def texts(self, column: str) -> list[bytes]:
        """The texts of a column, as bytes."""
        chunk, (starts, ends) = self._chunk, self._spans[column]
        found = [chunk[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        if self._escaped:
            found = [unescape(text.decode(*_ENCODING)).encode(*_ENCODING) for text in found]
        return found

    def numbers(self, column: str, base: int) -> Offsets:
        """Parse the numbers of a column, digit by digit for all rows at once; an empty one is 0."""
        starts, ends = self._spans[column]
        values = np.zeros(len(starts), np.int64)
        width = ends - starts
        longest = int(width.max(initial=0))
        if longest > (18 if base == 10 else 8):
            raise ValueError("a number is too long")
        for place in range(longest):
            rows = place < width
            digits = self._letters[np.where(rows, starts + place, 0)].astype(np.int64) - _ZERO
            digits -= np.where(digits > 9, 39, 0)  # a to f follow the digits 39 places on
            if np.any(rows & ((digits < 0) | (digits >= base))):
                raise ValueError("a number has a letter that is not a digit")
            values = np.where(rows, values * base + digits, values)
        return values
