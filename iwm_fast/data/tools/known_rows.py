"""Rows of earlier manifests of the same images, so that `data index` reads only what changed.

Beside a manifest lies ``.NAME.stamps``: 8 bytes per row, a checksum of the row and of what changes when its file does
(a file's size and times, an object's size and ETag), or zeros where nothing vouches for the row. A row is reused only
while its checksum is right, so a stamps file that is truncated or another manifest's vouches for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from iwm_fast.data.sources.manifest import Header, read_header
from iwm_fast.data.sources.names import unescape

__all__ = ["Known", "KnownRows", "row_sum", "stamps_file"]

_SUM = 8  # bytes per row
_UNKNOWN = bytes(_SUM)
_PATH, _FILE = 0, 6
_ENCODING = ("utf-8", "surrogateescape")


class Known(NamedTuple):
    """An earlier row: its line, its checksum, the manifest it is from, and the number of columns there."""

    line: bytes
    sum: bytes
    manifest: Path
    columns: int

    def still(self, stamp: bytes | None) -> bool:
        """Return whether the row is right for a file with this stamp."""
        return stamp is not None and row_sum(self.line, stamp) == self.sum


def stamps_file(manifest: Path) -> Path:
    """Return the place of a manifest's stamps."""
    return manifest.with_name(f"{'' if manifest.name.startswith('.') else '.'}{manifest.name}.stamps")


def row_sum(line: bytes, stamp: bytes | None) -> bytes:
    """Return the checksum of a row whose file has this stamp; zeros for None."""
    return _UNKNOWN if stamp is None else hashlib.blake2b(b"%b\0%b" % (stamp, line), digest_size=_SUM).digest()


class KnownRows:
    """The rows of some manifests, read while a sorted listing passes by. A manifest that has been passed is in
    `passed`.

    header: of the manifest that is being written; those of another kind, another root or (with a check) another check
    give no rows.
    """

    def __init__(self, manifests: Sequence[Path], header: Header) -> None:
        self._packed = header.source != "folder"
        self._rows = {path: _rows(path, header, packed=self._packed) for path in manifests}
        self._next = {path: next(rows, None) for path, rows in self._rows.items()}

    @property
    def passed(self) -> list[Path]:
        """The manifests without further rows."""
        return [path for path, row in self._next.items() if row is None]

    def take(self, name: str, piece: str) -> Known | None:
        """Return the next sample's row, or None. piece: its file."""
        key = piece if self._packed else name
        found = [self._advance(path, key, name) for path in self._rows]
        return next(filter(None, found), None)

    def _advance(self, path: Path, key: str, name: str) -> Known | None:
        row = self._next[path]
        while row is not None and row[0] < key:
            row = next(self._rows[path], None)
        found = None
        if row is not None and row[:2] == (key, name):
            found, row = row[2], next(self._rows[path], None)
        self._next[path] = row
        return found


def _rows(path: Path, wanted: Header, *, packed: bool) -> Iterator[tuple[str, str, Known]]:
    """Yield (file, or name of one with a single image; name; row) of the rows that may be reused."""
    try:
        with path.open("rb") as text, stamps_file(path).open("rb") as stamps:
            try:
                header = read_header(text.readline().decode(*_ENCODING))
            except ValueError:
                return
            if (header.source, header.root) != (wanted.source, wanted.root) or wanted.check not in (0, header.check):
                return
            columns = len(header.columns)
            text.readline()
            for line in text:
                known = Known(line, stamps.read(_SUM), path, columns)
                if not line.endswith(b"\n") or len(known.sum) < _SUM:
                    return
                words = line.split(b"\t")
                if len(words) != columns:
                    return
                if known.sum != _UNKNOWN:
                    name = _plain(words[_PATH])
                    yield _plain(words[_FILE]) if packed else name, name, known
    except FileNotFoundError:
        return


def _plain(field: bytes) -> str:
    return unescape(field.decode(*_ENCODING))
