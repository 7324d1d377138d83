"""WebDataset: tar shards, of which members with one name up to its first dot are a sample.

A shard is read by offset and length. They come from its DALI index beside it (`NAME.idx`, as `wds2idx` writes it), or
from one walk over the shard's headers where there is none.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iwm_fast.data.encoded import BadSample
from iwm_fast.data.sources.base import Labels, folder_labels, number_labels
from iwm_fast.data.sources.kinds import is_image, is_shard
from iwm_fast.data.sources.names import Names
from iwm_fast.data.sources.storage import Storage
from iwm_fast.errors import UserError

__all__ = ["CLASSES_FILE", "INDEX_VERSION", "WebDatasetSource", "index_name"]

INDEX_VERSION = "v1.2"
CLASSES_FILE = "classes.txt"  # beside the shards: a class's name a line, line n for the label n of the .cls members
# Read ahead of the headers of a shard without an index, for a storage whose every read is a request.
_WALK_BUFFER = 1 << 18


@dataclass
class _Member:
    name: str
    offset: int
    size: int


@dataclass
class _Sample:
    image: _Member
    label: _Member | None


def index_name(shard: str) -> str:
    """The name that `wds2idx` gives a shard's index: all from the first dot of the file's name is replaced."""
    return shard[: shard.index(".", shard.rfind("/") + 2)] + ".idx"


class WebDatasetSource:
    """The samples of the tar shards among the given names, shard after shard, each in its own order.

    A sample is a run of members whose names agree up to the first dot of their last part; its image is the first member
    with an image's extension, and a run without one is no sample. Its class: the text of its `.cls` member (with
    `classes.txt` beside the shards, that line of it), or the first folder of its name, as in a folder of images.
    """

    kind = "webdataset"

    def __init__(self, storage: Storage, names: list[str]) -> None:
        self.storage = storage
        self.shards = [name for name in names if is_shard(name)]
        known = set(names)
        self._has_classes = CLASSES_FILE in known
        with ThreadPoolExecutor(storage.readers) as pool:
            found = list(pool.map(lambda shard: _samples(storage, shard, index_name(shard) in known), self.shards))
        samples = [sample for shard in found for sample in shard]
        self._shard = np.repeat(np.arange(len(found), dtype=np.int32), [len(shard) for shard in found])
        self._offset = np.array([sample.image.offset for sample in samples], np.int64)
        self._size = np.array([sample.image.size for sample in samples], np.int64)
        self._members = Names.of(sample.image.name for sample in samples)
        spans = [(s.label.offset, s.label.size) if s.label is not None else (-1, -1) for s in samples]
        self._label_spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._offset)

    def name(self, sample: int) -> str:
        """shard.tar:member."""
        return f"{self.shards[self._shard[sample]]}:{self._members[sample]}"

    def read(self, sample: int) -> bytes:
        """The member's bytes."""
        size = int(self._size[sample])
        if not size:
            raise BadSample("the member is empty")
        raw = self.storage.read(self.shards[self._shard[sample]], int(self._offset[sample]), size)
        if len(raw) != size:
            raise BadSample(f"its shard ends {size - len(raw)} bytes before the member does")
        return raw

    def size(self, sample: int) -> int:
        """The member's length."""
        return int(self._size[sample])

    def extent(self, sample: int) -> tuple[str, int | None]:
        """The shard, and where in it the member's data begin."""
        return self.shards[self._shard[sample]], int(self._offset[sample])

    @cached_property
    def labels(self) -> Labels:
        """From the `.cls` members, one small read each, or from the names."""
        missing = np.flatnonzero(self._label_spans[:, 0] < 0)
        if len(missing) == len(self):
            return folder_labels(list(self._members))
        if len(missing):
            raise UserError(
                f"{self.storage.shown(self.name(int(missing[0])))}: no .cls member beside it, as {len(missing)} of "
                f"{len(self)} samples; give all of them a label, or none"
            )
        with ThreadPoolExecutor(self.storage.readers) as pool:
            texts = list(pool.map(self._label_text, range(len(self))))
        if not self._has_classes:
            return number_labels(texts)
        classes = tuple(self.storage.read(CLASSES_FILE).decode().splitlines())
        try:
            labels = np.array([int(text) for text in texts], np.int64)
        except ValueError as error:
            raise UserError(
                f"{self.storage.root}: a .cls member is no whole number ({error}); mend the shards"
            ) from error
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise UserError(
                f"{self.storage.shown(CLASSES_FILE)} has {len(classes)} lines, and there are labels from "
                f"{labels.min()} to {labels.max()}; mend or remove it"
            )
        return labels, classes

    def describe(self) -> str:
        """What these images come from."""
        return f"{len(self.shards)} WebDataset shards"

    def _label_text(self, sample: int) -> str:
        offset, size = self._label_spans[sample].tolist()
        try:
            return self.storage.read(self.shards[self._shard[sample]], offset, size).decode().strip()
        except (BadSample, UnicodeDecodeError) as error:
            raise UserError(f"{self.storage.shown(self.name(sample))}: its label cannot be read: {error}") from error


def _samples(storage: Storage, shard: str, indexed: bool) -> list[_Sample]:
    """The samples of one shard."""
    groups = _read_index(storage, shard) if indexed else _walk(storage, shard)
    found = []
    for members in groups:
        image = next((member for member in members if is_image(member.name)), None)
        label = next((member for member in members if member.name.endswith(".cls")), None)
        if image is not None:
            found.append(_Sample(image, label))
    return found


def _read_index(storage: Storage, shard: str) -> list[list[_Member]]:
    """Versions 1.1 (extension, offset, size) and 1.2 (and the member's name) of `wds2idx`."""
    name = index_name(shard)
    try:
        return _parse_index(storage.read(name).decode().splitlines())
    except (BadSample, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{storage.shown(name)}: not a DALI index of version 1.1 or 1.2 ({error}); write it again, "
            "or remove it (the shard is then walked through)"
        ) from error


def _parse_index(lines: list[str]) -> list[list[_Member]]:
    version, count = lines[0].split()
    words = {"v1.1": 3, "v1.2": 4}[version]
    if len(lines) - 1 != int(count):
        raise ValueError(f"{len(lines) - 1} samples where its first line says {count}")
    return [_components(line.split(), words, number) for number, line in enumerate(lines[1:])]


def _components(words: list[str], each: int, number: int) -> list[_Member]:
    if len(words) % each or not words:
        raise ValueError(f"line {number + 2} has {len(words)} words, which is no multiple of {each}")
    key = f"{number:08d}"
    return [
        _Member(words[at + 3] if each == 4 else f"{key}.{words[at]}", int(words[at + 1]), int(words[at + 2]))
        for at in range(0, len(words), each)
    ]


def _walk(storage: Storage, shard: str) -> list[list[_Member]]:
    """From the headers; hidden members and what is no regular file are left out, as `wds2idx` leaves them."""
    groups: list[list[_Member]] = []
    last = None
    try:
        for member in _headers(storage, shard):
            folder, _, file = member.name.rpartition("/")
            key = f"{folder}/{file.split('.', 1)[0]}"
            if not file or file.startswith("."):
                continue
            if key != last:
                groups.append([])
                last = key
            groups[-1].append(member)
    except (tarfile.TarError, BadSample, EOFError) as error:
        raise UserError(f"{storage.shown(shard)}: not a whole tar file ({error}); mend or remove it") from error
    return groups


def _headers(storage: Storage, shard: str) -> Iterator[_Member]:
    file = io.BufferedReader(_Piece(storage, shard), _WALK_BUFFER if storage.readers > 1 else 4096)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        at = 0
        try:
            for entry in archive:
                at = entry.offset_data + entry.size
                if entry.isreg():
                    yield _Member(entry.name, entry.offset_data, entry.size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        except tarfile.ReadError:
            if at <= storage.size(shard):
                raise
            # The shard ends within its last member: that one sample is bad, and found so when it is read.


class _Piece(io.RawIOBase):
    """A piece of a storage as a file that can be read and sought."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name, self._at = storage, name, 0
        self._size = storage.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._size - self._at)
        data = self._storage.read(self._name, self._at, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
