"""A manifest's text as a file that is read in pieces: header, chunks of whole rows, single rows.

No row stays in a process's memory: what is read is in the system's file cache, which all processes of a host share.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.names import escape, unescape
from iwm_fast.data.sources.storage import DataGone, LocalStorage, Storage
from iwm_fast.errors import UserError

__all__ = ["CHECK", "COLUMNS", "SCHEMA", "Header", "ManifestText", "not_whole", "read_header"]

SCHEMA = "#iwm-fast-manifest/1"
COLUMNS = ("path", "bytes", "width", "height", "label", "crc32c", "file", "offset")
CHECK = "check"  # an additional column, if images were checked
KINDS = ("folder", "webdataset", "tfrecord")

_FAMILY, _, _VERSION = SCHEMA.rpartition("/")
_PIECE = 1 << 22  # bytes read at once
_COPIED = 16 * _PIECE  # bytes of a request to an object store
_END = 1 << 16  # bytes of either end that `stamp` takes
_ENCODING = ("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Header:
    """The first line: kind of the source, root of the paths, samples, classes (may be empty), rules of the check."""

    source: str
    root: str
    samples: int
    classes: tuple[str, ...] = ()
    check: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of each row."""
        return (*COLUMNS, CHECK) if self.check else COLUMNS

    def line(self) -> str:
        """Return the line, without its line break."""
        classes = f"\tclasses={json.dumps(self.classes)}" if self.classes else ""
        check = f"\tcheck={self.check}" if self.check else ""
        return f"{SCHEMA}\tsource={self.source}\troot={escape(self.root)}\tsamples={self.samples}{classes}{check}"


def read_header(line: str) -> Header:
    """Parse the first line of a manifest. Raise ValueError if it is none, or one of another version."""
    schema, *fields = line.rstrip("\n").split("\t")
    values = dict(field.split("=", 1) for field in fields if "=" in field)
    family, _, version = schema.rpartition("/")
    if family == _FAMILY and schema != SCHEMA:
        raise ValueError(
            f"it is of version {version[:20]}, and this iwm-fast reads version {SCHEMA.rpartition('/')[2]}"
        )
    if schema != SCHEMA or values.keys() < {"source", "root", "samples"} or values["source"] not in KINDS:
        raise ValueError(f"its first line does not begin with {SCHEMA}")
    classes = json.loads(values.get("classes", "[]"))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")
    root, samples, check = unescape(values["root"]), int(values["samples"]), int(values.get("check", "0"))
    if samples < 0:
        raise ValueError(f"its first line says {samples} samples")
    return Header(values["source"], root, samples, tuple(classes), check)


def not_whole(shown: str, error: Exception) -> UserError:
    """Return the error for a manifest that cannot be used."""
    return UserError(f"{shown}: not a complete iwm-fast manifest ({error}); write it again with iwm-fast data index")


class ManifestText:
    """The file `name` of a storage, open. One in an object store is copied to a temporary file that has no name.

    header; begin: offset of the first row; size: bytes. Raises UserError where it is not a manifest.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.shown = storage.shown(name)
        self.local = isinstance(storage, LocalStorage)
        try:
            self._file = _opened(self.shown) if self.local else _copied(storage, name)
            status = os.fstat(self._file.fileno())
        except BadSample as error:
            raise UserError(f"{self.shown}: {error.reason}") from error
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be read: {error.strerror or error}") from error
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        try:
            first = self._line(0, _FAMILY)
            self.header = read_header(first)
            second = self._line(len(first), COLUMNS[0])
            _require_columns(second, self.header.columns)
        except ValueError as error:
            raise not_whole(self.shown, error) from error
        self.begin = len((first + second).encode(*_ENCODING))

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer where the file ends. Raises DataGone where its file system fails."""
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise DataGone(f"{self.shown}: cannot be read ({error.strerror or error})") from error

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, whole rows with their line breaks) from the first row to the last line break."""
        offset, left = self.begin, b""
        while piece := self.read(offset + len(left), _PIECE):
            whole = left + piece
            end = whole.rfind(b"\n") + 1
            if end:
                yield offset, whole[:end]
            offset, left = offset + end, whole[end:]
        if left:
            raise not_whole(self.shown, ValueError("its last line has no end: it was truncated"))

    def stamp(self) -> list[int]:
        """Return what changes when another file takes its place: size, time, and checksums of both ends."""
        ends = (self.read(0, _END), self.read(max(0, self.size - _END), _END))
        return [self.size, self.mtime_ns, *map(crc32c, ends)]

    def _line(self, offset: int, beginning: str) -> str:
        """The line at an offset, with its line break. ValueError where it begins otherwise, or has no end."""
        found = self.read(offset, _END)
        if not found.startswith(beginning.encode()):
            raise ValueError(f"its line {2 if offset else 1} does not begin with {COLUMNS[0] if offset else SCHEMA}")
        while b"\n" not in found:
            piece = self.read(offset + len(found), _END)
            if not piece:
                raise ValueError("it ends in its first lines")
            found += piece
        return found[: found.index(b"\n") + 1].decode(*_ENCODING)


def _require_columns(line: str, columns: tuple[str, ...]) -> None:
    if tuple(line.rstrip("\n").split("\t")) != columns:
        raise ValueError(f"its columns are not {', '.join(columns)}")


def _opened(path: str) -> BinaryIO:
    # not blocking, so that a named pipe cannot stop the command
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise BadSample("it is not a regular file")
    return cast("BinaryIO", file)


def _copied(storage: Storage, name: str) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the source)
    size = storage.size(name)
    for first in range(0, size, _COPIED):
        file.write(storage.read(name, first, min(_COPIED, size - first)))
    file.flush()
    return cast("BinaryIO", file)
