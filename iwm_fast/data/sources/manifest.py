r"""The manifest that `iwm-fast data index` writes: all that a training needs to know about its images, in one file.

UTF-8 text, one line per sample, so any tool can read, search and compare it:

    #iwm-fast-manifest/1<TAB>source=folder<TAB>root=.<TAB>samples=3<TAB>classes=["cat", "dog"]
    path  bytes  width  height  label  crc32c  file  offset          (tabs between)
    cat/1.jpg  4711  640  480  cat  90abcdef

| field | value |
|---|---|
| path | the sample's name below the root; tabs, line breaks and backslashes are \t, \n, \r, \\ |
| bytes | of the encoded image |
| width, height | pixels of the upright image, 0 if its header is unreadable |
| label | the class name, or empty |
| crc32c | of the encoded image, 8 hexadecimal digits |
| file, offset | the shard with the image, and the offset of its bytes; empty for an image in its own file |
| root (first line) | where the paths begin; "." is the manifest's own folder |
| classes (first line) | all class names as JSON, in label order; default: those of the labels |

With `--check` the first line also has check=N, the version of the rules of the check, and each row ends with a column
"check": 1 to 8, a plain file with that EXIF orientation; 9, Pillow decodes it; 0, a bad sample, or one above the size
limit. A training takes the result from here for bytes whose checksum is the row's, if the rules are its own.

**A sample that changed since it was indexed is a bad sample.** Length and CRC-32C are compared at every read, so a file
that changed, shrank or vanished is skipped, replaced, counted and listed like one that cannot be decoded, and above
`data.max_bad_fraction` the run stops. An added file is not seen until the folder is indexed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.decode.verdicts import PILLOW, PLAIN, RULES, Verdict
from iwm_fast.data.sources.base import UNLABELLED, Labels, folder_labels, number_labels
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.list_digest import ListSums
from iwm_fast.data.sources.manifest_index import ManifestIndex, open_index
from iwm_fast.data.sources.manifest_scan import BY_PILLOW, STRIDE
from iwm_fast.data.sources.manifest_text import CHECK, COLUMNS, SCHEMA, Header, ManifestText, read_header
from iwm_fast.data.sources.names import escape, unescape
from iwm_fast.data.sources.storage import Storage
from iwm_fast.errors import UserError

__all__ = ["BY_PILLOW", "CHECK", "COLUMNS", "SCHEMA", "Header", "ManifestSource", "ManifestText", "read_header"]

_WORDS = {"folder": "an image folder", "webdataset": "WebDataset shards", "tfrecord": "TFRecord files"}
_PATH, _BYTES, _WIDTH, _HEIGHT, _LABEL, _CRC, _FILE, _OFFSET = range(len(COLUMNS))
_CHECKED = len(COLUMNS)
_ENCODING = ("utf-8", "surrogateescape")
_WAS_EMPTY = "it was empty or unreadable when it was indexed"


class ManifestSource:
    """The samples of the manifest `name` of a storage `place`; no other file is listed or opened.

    storage: where the paths begin. A row is read when its sample is needed, from the file that all processes of a host
    share in the system's cache, so a process holds no rows.
    """

    def __init__(self, storage: Storage, place: Storage, name: str, text: ManifestText | None = None) -> None:
        self.storage, self._place = storage, (place, name)
        self.left_out = LeftOut()
        self._text = text or ManifestText(place, name)
        self._shown, header = self._text.shown, self._text.header
        self.index: ManifestIndex = open_index(self._text)
        self.kind, self._classes, self._check, self._count = header.source, header.classes, header.check, header.samples
        self._columns = len(header.columns)
        self._last: tuple[int, list[bytes]] = (-1, [])

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: it opens the manifest itself."""
        return _reopened, (self.storage, *self._place, self._text.size, self._text.mtime_ns)

    def __len__(self) -> int:
        return self._count

    def name(self, sample: int) -> str:
        """The path, as it was indexed."""
        return _text_of(self._row(sample)[_PATH])

    def read(self, sample: int) -> bytes:
        """Return the image's bytes, checked against length and checksum of the manifest."""
        row = self._row(sample)
        if not self._number(row, _BYTES, sample):
            raise BadSample(_WAS_EMPTY)
        if self.kind == "folder":
            return self.unpack(sample, self.storage.read(_text_of(row[_PATH])))
        file, offset, size = self.span(sample)
        return self.unpack(sample, self.storage.read(file, offset, size))

    def span(self, sample: int) -> tuple[str, int, int]:
        """From the manifest; of shards and TFRecord files only."""
        row = self._row(sample)
        return _text_of(row[_FILE]), self._number(row, _OFFSET, sample), self._number(row, _BYTES, sample)

    def unpack(self, sample: int, raw: bytes) -> bytes:
        """The bytes, checked against length and checksum of the manifest."""
        row = self._row(sample)
        size = self._number(row, _BYTES, sample)
        if not size:
            raise BadSample(_WAS_EMPTY)
        if len(raw) != size:
            raise BadSample(f"it changed since it was indexed: it has {len(raw)} bytes, not {size}")
        if crc32c(raw) != self._number(row, _CRC, sample, 16):
            raise BadSample("it changed since it was indexed: its checksum differs")
        return raw

    def size(self, sample: int) -> int:
        """From the manifest."""
        return self._number(self._row(sample), _BYTES, sample)

    def extent(self, sample: int) -> tuple[str, int | None]:
        """From the manifest."""
        row = self._row(sample)
        if self.kind == "folder":
            return _text_of(row[_PATH]), None
        return _text_of(row[_FILE]), self._number(row, _OFFSET, sample)

    @cached_property
    def labels(self) -> Labels:
        """From the manifest; the first use reads all of it."""
        if not self._classes:
            known: dict[bytes, str] = {}
            texts = [known.setdefault(label, _text_of(label)) for label in self._labels()]
            # in the order of a folder source, whose labels are its folders; other sources number them
            return folder_labels([f"{text}/" for text in texts]) if self.kind == "folder" else number_labels(texts)
        place = {escape(name).encode(*_ENCODING): label for label, name in reversed(list(enumerate(self._classes)))} | {
            b"": UNLABELLED
        }
        found = np.fromiter((place.get(label, -2) for label in self._labels()), np.int64, len(self))
        unknown = np.flatnonzero(found == -2)
        if len(unknown):
            sample = int(unknown[0])
            raise UserError(
                f"{self._shown}: {escape(self.name(sample))} has the label {_shown(self._row(sample)[_LABEL])}, which "
                "is not a class of its first line; write it again with iwm-fast data index"
            )
        return found, self._classes

    @property
    def sums(self) -> ListSums:
        """Sums of all names and sizes, computed when the manifest was indexed."""
        return self.index.sums

    @property
    def unchecked(self) -> int:
        """The number of samples without a verdict."""
        return self.index.unchecked

    def verdict(self, sample: int) -> Verdict | None:
        """From the manifest, if it was checked by the rules of this version."""
        if self._check != RULES:
            return None
        row = self._row(sample)
        checked = self._number(row, _CHECKED, sample)
        if not checked:
            return None
        state, orientation = (PILLOW, 1) if checked == BY_PILLOW else (PLAIN, checked)
        width, height, size = (self._number(row, column, sample) for column in (_WIDTH, _HEIGHT, _BYTES))
        return state, orientation, width, height, size

    def shards(self) -> dict[str, int] | None:
        """From the index, where it has all files, and each one's rows follow each other."""
        counts = {name: last + 1 - first for name, first, last in self.index.places}
        known = self.kind != "folder" and self.index.all_places and sum(counts.values()) == len(self)
        return counts if known else None

    @property
    def written_ns(self) -> int:
        """When the manifest was written."""
        return self._text.mtime_ns

    def describe(self) -> str:
        """Describe the source of the images."""
        return f"{_WORDS[self.kind]} in the manifest {self._shown}"

    def _labels(self) -> Iterator[bytes]:
        for _, chunk in self._text.chunks():
            for line in chunk[:-1].split(b"\n"):
                yield line.split(b"\t")[_LABEL]

    def _row(self, sample: int) -> list[bytes]:
        """The fields of a row, escaped. Any thread may call it."""
        if not -self._count <= sample < self._count:
            raise IndexError(f"sample is {sample}; the manifest has {self._count}")
        block, place = divmod(int(sample) % self._count, STRIDE)
        known, lines = self._last
        if known != block:
            begin, end = self.index.span(block)
            raw = self._text.read(begin - 1, end - begin + 1) if 0 < begin < end else b""
            lines = raw[1:-1].split(b"\n")
            if raw[:1] + raw[-1:] != b"\n\n" or len(lines) != min(STRIDE, self._count - block * STRIDE):
                raise self._changed(sample)
            self._last = block, lines
        row = lines[place].split(b"\t")
        if len(row) != self._columns:
            raise self._changed(sample)
        return row

    def _number(self, row: list[bytes], column: int, sample: int, base: int = 10) -> int:
        try:
            return int(row[column] or b"0", base)
        except ValueError:
            raise self._changed(sample) from None

    def _changed(self, sample: int) -> UserError:
        return UserError(
            f"{self._shown}: line {sample + 3} is not the row that was there when it was indexed; write the manifest "
            "again with iwm-fast data index"
        )


def _reopened(storage: Storage, place: Storage, name: str, size: int, mtime_ns: int) -> ManifestSource:
    found = ManifestText(place, name)
    if found.local and (found.size, found.mtime_ns) != (size, mtime_ns):
        raise UserError(f"{found.shown}: was replaced while it was in use; start again")
    return ManifestSource(storage, place, name, found)


def _text_of(field: bytes) -> str:
    return unescape(field.decode(*_ENCODING))


def _shown(field: bytes) -> str:
    return field.decode(*_ENCODING)
