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

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.decode.verdicts import PILLOW, PLAIN, RULES, UNKNOWN, VERDICT, Verdicts
from iwm_fast.data.sources.base import UNLABELLED, Labels, folder_labels, number_labels
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.names import Names, escape, unescape
from iwm_fast.data.sources.storage import Storage
from iwm_fast.errors import UserError

__all__ = ["BY_PILLOW", "CHECK", "COLUMNS", "SCHEMA", "Header", "ManifestSource", "read_header", "root_of"]

SCHEMA = "#iwm-fast-manifest/1"
COLUMNS = ("path", "bytes", "width", "height", "label", "crc32c", "file", "offset")
CHECK = "check"  # an additional column, if images were checked
BY_PILLOW = 9

_TAB, _LINE, _ZERO = 9, 10, 48
_WORDS = {"folder": "an image folder", "webdataset": "WebDataset shards", "tfrecord": "TFRecord files"}


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
    """Parse the first line of a manifest. Raise ValueError if it is none."""
    schema, *fields = line.rstrip("\n").split("\t")
    values = dict(field.split("=", 1) for field in fields if "=" in field)
    if schema != SCHEMA or values.keys() < {"source", "root", "samples"} or values["source"] not in _WORDS:
        raise ValueError(f"its first line does not begin with {SCHEMA}")
    classes = json.loads(values.get("classes", "[]"))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")
    root, samples, check = unescape(values["root"]), int(values["samples"]), int(values.get("check", "0"))
    return Header(values["source"], root, samples, tuple(classes), check)


def root_of(text: bytes, shown: str) -> str:
    """Return where the paths of a manifest begin. Raise UserError if it is not a manifest."""
    try:
        return read_header(text[: text.index(b"\n")].decode("utf-8", "surrogateescape")).root
    except ValueError as error:
        raise _not_whole(shown, error) from error


def _not_whole(shown: str, error: Exception) -> UserError:
    return UserError(f"{shown}: not a complete iwm-fast manifest ({error}); write it again with iwm-fast data index")


class ManifestSource:
    """The samples of a manifest `text`, called `shown` in errors; no file is listed or opened.

    storage: where the paths begin.
    """

    def __init__(self, storage: Storage, text: bytes, shown: str) -> None:
        self.storage, self._shown = storage, shown
        self.left_out = LeftOut()
        try:
            header = read_header(text[: text.index(b"\n")].decode("utf-8", "surrogateescape"))
            self.kind, self._classes = header.source, header.classes
            self._check = header.check
            self._parse(text, header.samples, header.columns)
        except ValueError as error:
            raise _not_whole(shown, error) from error

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, sample: int) -> str:
        """The path, as it was indexed."""
        return self._paths[sample]

    def read(self, sample: int) -> bytes:
        """Return the image's bytes, checked against length and checksum of the manifest."""
        size = int(self._bytes[sample])
        if not size:
            raise BadSample("it was empty or unreadable when it was indexed")
        if self.kind == "folder":
            raw = self.storage.read(self._paths[sample])
        else:
            raw = self.storage.read(self._files[self._file[sample]], int(self._offset[sample]), size)
        if len(raw) != size:
            raise BadSample(f"it changed since it was indexed: it has {len(raw)} bytes, not {size}")
        if crc32c(raw) != self._crc[sample]:
            raise BadSample("it changed since it was indexed: its checksum differs")
        return raw

    def size(self, sample: int) -> int:
        """From the manifest."""
        return int(self._bytes[sample])

    def extent(self, sample: int) -> tuple[str, int | None]:
        """From the manifest."""
        if self.kind == "folder":
            return self._paths[sample], None
        return self._files[self._file[sample]], int(self._offset[sample])

    @cached_property
    def labels(self) -> Labels:
        """From the manifest."""
        texts = list(self._labels)
        if not self._classes:
            # in the order of a folder source, whose labels are its folders; other sources number them
            return folder_labels([f"{text}/" for text in texts]) if self.kind == "folder" else number_labels(texts)
        place = {name: label for label, name in reversed(list(enumerate(self._classes)))} | {"": UNLABELLED}
        unknown = next((row for row, text in enumerate(texts) if text not in place), None)
        if unknown is not None:
            raise UserError(
                f"{self._shown}: {escape(self.name(unknown))} has the label {escape(texts[unknown])}, which is not "
                "a class of its first line; write it again with iwm-fast data index"
            )
        return np.array([place[text] for text in texts], np.int64), self._classes

    @property
    def verdicts(self) -> Verdicts | None:
        """From the manifest, if it was checked by the rules of this version."""
        if self._check != RULES:
            return None
        found = np.zeros(len(self), VERDICT)
        found["orientation"] = np.where(self._checked == BY_PILLOW, 1, self._checked)
        found["state"] = np.where(self._checked > 0, PLAIN, UNKNOWN)
        found["state"][self._checked == BY_PILLOW] = PILLOW
        found["width"], found["height"], found["length"] = self._width, self._height, self._bytes
        return found

    def pieces(self) -> list[str]:
        """The files that hold the samples."""
        return list(self._paths) if self.kind == "folder" else self._files

    def describe(self) -> str:
        """Describe the source of the images."""
        return f"{_WORDS[self.kind]} in the manifest {self._shown}"

    def _parse(self, text: bytes, samples: int, columns: tuple[str, ...]) -> None:
        """Parse the columns into arrays; a million rows take less than a second."""
        letters = np.frombuffer(text, np.uint8)
        lines = np.flatnonzero(letters == _LINE)
        if len(lines) != samples + 2 or lines[-1] != len(text) - 1:
            raise ValueError(f"it has {max(0, len(lines) - 2)} rows, and its first line says {samples}")
        if tuple(text[lines[0] + 1 : lines[1]].decode().split("\t")) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
        tabs = np.flatnonzero(letters == _TAB)
        tabs = tabs[tabs > lines[1]]
        if len(tabs) != samples * (len(columns) - 1):
            raise ValueError("a row has the wrong number of columns")
        tabs = tabs.reshape(samples, -1)
        starts = np.concatenate([lines[1:-1, None] + 1, tabs + 1], axis=1)
        ends = np.concatenate([tabs, lines[2:, None]], axis=1)
        if np.any(ends < starts):
            raise ValueError("a row has the wrong number of columns")
        column = {name: (starts[:, at], ends[:, at]) for at, name in enumerate(columns)}
        escaped = b"\\" in text
        self._paths = Names(text, *column["path"], escaped=escaped)
        self._labels = Names(text, *column["label"], escaped=escaped)
        self._bytes = _numbers(letters, *column["bytes"], 10)
        self._crc = _numbers(letters, *column["crc32c"], 16)
        self._offset = _numbers(letters, *column["offset"], 10)
        if self._check:
            self._width, self._height, self._checked = (
                _numbers(letters, *column[name], 10) for name in ("width", "height", CHECK)
            )
            if np.any(self._checked > BY_PILLOW):
                raise ValueError(f"a value of check is above {BY_PILLOW}")
        if self.kind != "folder":
            files = list(Names(text, *column["file"], escaped=escaped))
            self._files = sorted(set(files))
            place = {file: at for at, file in enumerate(self._files)}
            self._file = np.array([place[file] for file in files], np.int32)


def _numbers(
    letters: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], base: int
) -> NDArray[np.int64]:
    """Parse the numbers between the given offsets, digit by digit for all rows at once; an empty one is 0."""
    values = np.zeros(len(starts), np.int64)
    width = ends - starts
    longest = int(width.max(initial=0))
    if longest > (18 if base == 10 else 8):
        raise ValueError("a number is too long")
    for place in range(longest):
        rows = place < width
        digits = letters[np.where(rows, starts + place, 0)].astype(np.int64) - _ZERO
        digits -= np.where(digits > 9, 39, 0)  # a to f follow the digits 39 places on
        if np.any(rows & ((digits < 0) | (digits >= base))):
            raise ValueError("a number has a letter that is not a digit")
        values = np.where(rows, values * base + digits, values)
    return values
