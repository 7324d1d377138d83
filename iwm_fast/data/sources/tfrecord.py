"""TFRecord files of `tf.train.Example` with `image/encoded`, and `image/class/label` if there are classes.

A record is a length (8 bytes), its masked CRC-32C (4), the payload and its masked CRC-32C (4); both are checked at
every read. The offsets of the records come from the index beside the file (as DALI's `tfrecord2idx` writes it: a line
"offset length" per record) if that matches the file, or from one walk over the lengths.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.base import Labels, Unindexed, number_labels
from iwm_fast.data.sources.checksum import masked_crc32c
from iwm_fast.data.sources.example import encoded_image, label_of
from iwm_fast.data.sources.kinds import is_records, record_index_names
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.shard_index import Misfit, is_older
from iwm_fast.data.sources.storage import Storage
from iwm_fast.errors import UserError

__all__ = ["TFRecordSource"]

_HEADER, _FOOTER = 12, 4
_SPOTS = 5  # records of a file that are compared with its index
CUT_OFF = "truncated file(s)"
NO_RECORD = "file(s) without a record"
MISFIT = "index(es) that do not match their file, which was read without"


class TFRecordSource(Unindexed):
    """The records of the TFRecord files among the given names, file after file. A record's name is file:offset."""

    kind = "tfrecord"

    def __init__(self, storage: Storage, names: list[str]) -> None:
        self.storage = storage
        self.files = [name for name in names if is_records(name)]
        self.left_out = LeftOut()
        known = set(names)
        with ThreadPoolExecutor(storage.readers) as pool:
            opened = list(pool.map(lambda file: _open(storage, file, known), self.files))
        for _, left_out in opened:
            self.left_out.merge(left_out)
        found = [records for records, _ in opened]
        self.left_out.add(
            NO_RECORD, *(file for file, records in zip(self.files, found, strict=True) if not len(records))
        )
        self._file = np.repeat(np.arange(len(found), dtype=np.int32), [len(records) for records in found])
        self._records = np.concatenate(found) if found else np.zeros((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, sample: int) -> str:
        """file.tfrecord:offset of the record."""
        return f"{self.files[self._file[sample]]}:{self._records[sample, 0]}"

    def read(self, sample: int) -> bytes:
        """Return the record's image. Raise BadSample if a checksum is wrong or there is no image."""
        file, offset, length = self.span(sample)
        return self.unpack(sample, self.storage.read(file, offset, length))

    def span(self, sample: int) -> tuple[str, int, int]:
        """The record with its framing."""
        offset, length = self._records[sample].tolist()
        return self.files[self._file[sample]], offset, length

    def unpack(self, sample: int, raw: bytes) -> bytes:
        """The record's image."""
        try:
            raw = encoded_image(self._checked(sample, raw))
        except ValueError as error:
            raise BadSample(str(error)) from error
        if not raw:
            raise BadSample("image/encoded is empty")
        return raw

    def size(self, sample: int) -> int:
        """Return the image's bytes; reads the record."""
        return len(self.read(sample))

    def extent(self, sample: int) -> tuple[str, int | None]:
        """Return the file, and the offset of the image's bytes in it. Reads the record."""
        payload = self._payload(sample)
        # equal bytes are the same image wherever they are, so the first match is right
        within = payload.index(self.read(sample))
        return self.files[self._file[sample]], int(self._records[sample, 0]) + _HEADER + within

    @cached_property
    def labels(self) -> Labels:
        """From `image/class/label` of every record; reads all files."""
        with ThreadPoolExecutor(self.storage.readers) as pool:
            found = list(pool.map(self._label, range(len(self))))
        # any label will do for a damaged record: its image is never read
        known = next((label for label in found if label), "")
        return number_labels([known if label is None else label for label in found])

    def shards(self) -> dict[str, int]:
        """Counted when they were listed."""
        return dict(zip(self.files, np.bincount(self._file, minlength=len(self.files)).tolist(), strict=True))

    def describe(self) -> str:
        """Describe the source of the images."""
        return f"{len(self.files)} TFRecord files"

    def _label(self, sample: int) -> str | None:
        """Return a record's label; None if the record is damaged."""
        try:
            return label_of(self._payload(sample))
        except (BadSample, ValueError):
            return None

    def _payload(self, sample: int) -> bytes:
        file, offset, length = self.span(sample)
        return self._checked(sample, self.storage.read(file, offset, length))

    def _checked(self, sample: int, raw: bytes) -> bytes:
        """The payload of a record. BadSample where it is not whole."""
        length = int(self._records[sample, 1])
        if len(raw) < length or length < _HEADER + _FOOTER:
            raise BadSample(f"its file ends {length - len(raw)} bytes before the record does")
        if _length(raw) != length - _HEADER - _FOOTER:
            raise BadSample("the record's length is damaged, or its index belongs to another file")
        payload = raw[_HEADER:-_FOOTER]
        if struct.unpack("<I", raw[-_FOOTER:])[0] != masked_crc32c(payload):
            raise BadSample("the record's checksum is wrong")
        return payload


def _length(header: bytes) -> int | None:
    """Return the payload's length, or None if its checksum is wrong."""
    length, crc = struct.unpack_from("<QI", header)
    return int(length) if crc == masked_crc32c(header[:8]) else None


def _open(storage: Storage, file: str, known: set[str]) -> tuple[NDArray[np.int64], LeftOut]:
    try:
        return _records(storage, file, known)
    except BadSample as bad:
        raise UserError(f"{storage.shown(file)}: {bad.reason}; fix or remove the file") from bad


def _records(storage: Storage, file: str, known: set[str]) -> tuple[NDArray[np.int64], LeftOut]:
    """Return offset and length of every record with its 16 bytes of framing, int64 (n, 2), and what is left out."""
    left_out = LeftOut()
    for index in record_index_names(file):
        if index in known:
            try:
                return _indexed(storage, file, index), left_out
            except Misfit:
                left_out.add(MISFIT, index)
    return _walk(storage, file, left_out), left_out


def _indexed(storage: Storage, file: str, index: str) -> NDArray[np.int64]:
    """Return the records of an index. Raise Misfit if the file has other records."""
    try:
        words = storage.read(index).split()
        records = np.array([int(word) for word in words], np.int64).reshape(-1, 2)
    except (BadSample, ValueError, OverflowError) as error:
        raise Misfit(str(error)) from error
    ends = np.concatenate([np.zeros(1, np.int64), records.sum(axis=1)])
    if np.any(records[:, 0] != ends[:-1]) or ends[-1] != storage.size(file):
        raise Misfit("its records are not contiguous over the whole file")
    torn = 0
    count = len(records) if is_older(storage, index, file) else _SPOTS
    spots = sorted({place * (len(records) - 1) // max(1, count - 1) for place in range(count)}) if len(records) else []
    for offset, length in records[spots].tolist():
        header = storage.read(file, offset, _HEADER)
        said = _length(header) if len(header) == _HEADER else None
        torn += said is None  # one damaged record is the file's fault, many are the index's
        if said not in (None, length - _HEADER - _FOOTER):
            raise Misfit(f"a record of another length begins at byte {offset}")
    if 2 * torn > len(spots):
        raise Misfit("there are no records where it has them")
    return records


def _walk(storage: Storage, file: str, left_out: LeftOut) -> NDArray[np.int64]:
    size, at, found = storage.size(file), 0, []
    while at < size:
        header = storage.read(file, at, _HEADER)
        length = _length(header) if len(header) == _HEADER else None
        if length is None and at and len(header) < _HEADER:
            left_out.add(CUT_OFF, file)
            break
        if length is None:
            packed = " (it looks gzip-compressed, without random access)" if header[:2] == b"\x1f\x8b" else ""
            raise UserError(f"{storage.shown(file)}: no TFRecord begins at byte {at}{packed}; fix or remove the file")
        found.append((at, _HEADER + length + _FOOTER))
        at += found[-1][1]
    return np.array(found, np.int64).reshape(-1, 2)
