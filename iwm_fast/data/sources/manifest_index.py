"""Where each row of a manifest begins, and what opening it would otherwise count over all rows.

The index of a large manifest is a file beside it, ``.NAME.rows``. `iwm-fast data index` writes it; where it is missing
or belongs to another text, the first process that opens the manifest reads all rows once and writes it, and those that
open it meanwhile wait. It holds the offset of every 32nd row, so 25 MB for 1e8 rows, of which a process reads the 16
bytes that it needs. So opening takes the same time for a thousand rows and for 1e8.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.verdicts import RULES
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.list_digest import ListSums
from iwm_fast.data.sources.manifest_scan import STRIDE, Scan, scan
from iwm_fast.data.sources.manifest_text import ManifestText
from iwm_fast.data.sources.storage import DataGone
from iwm_fast.errors import because
from iwm_fast.file_locks import hold
from iwm_fast.long_work import note_progress
from iwm_fast.notices import tell_once

__all__ = ["LOOKED_AT", "ManifestIndex", "index_file", "open_index"]

# A smaller manifest is read anew by each process: 8 MB are 100,000 rows, and 0.15 s.
WORTH_A_FILE = 8 * 2**20
# Folders or files whose times are compared with the manifest's, at most: 10,000 take 20 ms on a disk.
LOOKED_AT = 10_000
_WORTH_A_LINE = 1_000_000  # rows to read, 3 s
_MAGIC = b"#iwm-fast-manifest-rows/1\n"
_HEAD = len(_MAGIC) + 16  # and time of its folder, bytes of the facts
_WAIT_S = 0.2
_LINE_EVERY_S = 10.0


@dataclass(frozen=True, eq=False)
class ManifestIndex:
    """unchecked: rows without a verdict. places: (name, first row, last row) of folders with images, or of files that
    hold them, at most LOOKED_AT; all_places: whether these are all. settled_ns: the time of the manifest's folder when
    this index was added to it, 0 where something else had been added before.
    """

    sums: ListSums
    unchecked: int
    places: tuple[tuple[str, int, int], ...]
    all_places: bool
    settled_ns: int
    _starts: NDArray[np.int64] | None
    _file: BinaryIO | None
    _starts_at: int = 0
    _files_at: tuple[int, int] = (0, 0)
    _files: tuple[str, ...] = ()

    def span(self, block: int) -> tuple[int, int]:
        """Return the offsets of the first row of a block of STRIDE rows, and of the block's end; (0, 0) where the index
        was cut.
        """
        if self._starts is not None:
            return int(self._starts[block]), int(self._starts[block + 1])
        raw = self._bytes(self._starts_at + 8 * block, 16)
        return (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")) if len(raw) == 16 else (0, 0)

    def files(self) -> tuple[str, ...]:
        """Return all files that hold samples, sorted; none for images in their own files."""
        if self._file is None:
            return self._files
        text = self._bytes(*self._files_at)
        return tuple(text.decode("utf-8", "surrogateescape").split("\n")) if text else ()

    def _bytes(self, offset: int, length: int) -> bytes:
        assert self._file is not None
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise DataGone(f"{self._file.name}: cannot be read ({error.strerror or error})") from error


def index_file(manifest: str) -> Path:
    """Return the place of a manifest's index."""
    path = Path(manifest)
    return path.with_name(f".{path.name}.rows")


def open_index(text: ManifestText) -> ManifestIndex:
    """Return the index of a manifest, from its file if it is this text's, else from the text, whose every row is
    checked then. Raises UserError where the manifest is not whole.
    """
    if text.size < WORTH_A_FILE or not text.local:
        return _in_memory(scan(text))
    place = index_file(text.shown)
    try:
        before = _time(place.parent)
        with _only_one(place, text) as found:
            if found is not None:
                return found
            if text.header.samples >= _WORTH_A_LINE:
                _say(f"{text.shown}: reading its {text.header.samples} rows once, to write {place.name} beside it")
            done = scan(text, _lines(text))
            _write(place, text, done)
        if before <= text.mtime_ns:
            _settle(place)
        return _read(place, text) or _in_memory(done)
    except OSError as error:
        tell_once(
            f"{place}: the index of {text.shown} cannot be written ({because(error)}), so each process reads all of "
            f"its {text.header.samples} rows at its start; run iwm-fast data index where the folder is writable"
        )
        return _in_memory(scan(text))


@contextmanager
def _only_one(place: Path, text: ManifestText) -> Iterator[ManifestIndex | None]:
    """Yield the index, or None where this process is to write it: alone, others wait."""
    lock = place.with_name(f"{place.name}.lock")
    while (found := _read(place, text)) is None:
        with lock.open("a+b") as file:
            try:
                hold(file, str(place))
            except BlockingIOError:
                time.sleep(_WAIT_S)
                note_progress()  # another process holds the lock, so it reads
                continue
            try:
                yield _read(place, text)
            finally:
                with suppress(OSError):
                    lock.unlink()
            return
    yield found


def _lines(text: ManifestText) -> Callable[[int], None]:
    """Return what is called with the number of rows read, and prints a line now and then. The one process that reads
    prints, whatever its rank: the others wait for it.
    """
    began = last = time.monotonic()

    def tell(row: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            left = (now - began) * (text.header.samples - row) / row
            _say(f"{text.shown}: read {row} of {text.header.samples} rows, {left:.0f} s left")

    return tell


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settle(place: Path) -> None:
    """Note the time of the folder in the file, which alone has changed it: the folder need not be listed for that."""
    with place.open("r+b") as file:
        file.seek(len(_MAGIC))
        file.write(_time(place.parent).to_bytes(8, "little"))


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _spread(found: Scan) -> tuple[tuple[str, int, int], ...]:
    """The places, or as many of them as LOOKED_AT, evenly spread."""
    places = found.places
    if len(places) <= LOOKED_AT:
        return tuple(places)
    return tuple(places[number * len(places) // LOOKED_AT] for number in range(LOOKED_AT))


def _in_memory(found: Scan) -> ManifestIndex:
    kept = _spread(found)
    return ManifestIndex(
        found.sums, found.unchecked, kept, len(kept) == len(found.places), 0, found.starts, None, _files=found.files
    )


def _write(place: Path, text: ManifestText, found: Scan) -> None:
    kept = _spread(found)
    starts, files = found.starts.astype("<i8").tobytes(), "\n".join(found.files).encode("utf-8", "surrogateescape")
    facts = json.dumps(
        {
            "stamp": text.stamp(), "rules": RULES, "stride": STRIDE, "sums": found.sums.document(),
            "unchecked": found.unchecked, "places": kept, "all_places": len(kept) == len(found.places),
            "starts": len(starts), "files": len(files),
        }
    ).encode()  # fmt: skip
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(
                _MAGIC + bytes(8) + len(facts).to_bytes(8, "little") + facts + crc32c(facts).to_bytes(4, "little")
            )
            file.write(starts)
            file.write(files)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _read(place: Path, text: ManifestText) -> ManifestIndex | None:
    """The index in a file; None where there is none, or it is damaged or another text's."""
    try:
        file = place.open("rb")
    except FileNotFoundError:
        return None
    found = _parsed(file, text)
    if found is None:
        file.close()
    return found


def _parsed(file: BinaryIO, text: ManifestText) -> ManifestIndex | None:
    head = os.pread(file.fileno(), _HEAD, 0)
    if len(head) < _HEAD or not head.startswith(_MAGIC):
        return None
    settled, length = (int.from_bytes(head[at : at + 8], "little") for at in (len(_MAGIC), len(_MAGIC) + 8))
    raw = os.pread(file.fileno(), length + 4, _HEAD)
    if len(raw) < length + 4 or crc32c(raw[:length]) != int.from_bytes(raw[length:], "little"):
        return None
    facts: dict[str, Any] = json.loads(raw[:length])
    starts_at = _HEAD + len(raw)
    files_at = starts_at + facts["starts"]
    whole = os.fstat(file.fileno()).st_size == files_at + facts["files"]
    if not whole or facts["stamp"] != text.stamp() or (facts["stride"], facts["rules"]) != (STRIDE, RULES):
        return None
    return ManifestIndex(
        sums=ListSums.of(facts["sums"]),
        unchecked=facts["unchecked"],
        places=tuple((name, first, last) for name, first, last in facts["places"]),
        all_places=facts["all_places"],
        settled_ns=settled,
        _starts=None,
        _file=file,
        _starts_at=starts_at,
        _files_at=(files_at, facts["files"]),
    )
