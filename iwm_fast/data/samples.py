"""Reads the samples of a batch: headers checked once a file, small sets kept in memory, bad files replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.absence import read_present
from iwm_fast.data.bad import BadSamples
from iwm_fast.data.encoded import BadSample, Encoded, inspect, reencode
from iwm_fast.data.files import ImageSet
from iwm_fast.data.randomness import REPLACEMENT, uniforms

__all__ = ["KEPT_BYTES", "FileStore", "SampleReader", "Samples", "candidates"]

# Encoded bytes kept in memory by a process: all of CIFAR-10 (50 MB) or STL-10, the first few thousand of ImageNet.
KEPT_BYTES = 512 * 2**20
# Replacements drawn for a bad sample before the files are taken one after the other.
_CANDIDATES = 16

_UNKNOWN, _PLAIN, _REENCODED, _BAD = range(4)


class FileStore:
    """Files by number, ready for DALI. What was found out about a file is remembered, and its bytes while they are few.

    A file that was found plain is only read again on later visits; its header is looked at anew if its length changed.
    wait_s: seconds to wait for data that are gone.
    readers: files that are read at a time, default what suits the place where they lie. keep: whether to keep bytes.
    """

    def __init__(
        self, images: ImageSet, max_pixels: int, wait_s: float = 0.0, *, readers: int | None = None, keep: bool = True
    ) -> None:
        self.images, self.max_pixels, self.wait_s = images, max_pixels, wait_s
        self._closed = threading.Event()
        self._state = np.zeros(len(images), np.uint8)
        self._width = np.zeros(len(images), np.int32)
        self._height = np.zeros(len(images), np.int32)
        self._orientation = np.zeros(len(images), np.uint8)
        self._length = np.zeros(len(images), np.int64)
        self._reasons: dict[int, str] = {}
        self._kept: dict[int, Encoded] = {}
        self._kept_bytes, self._keeps = 0, keep
        readers = readers or images.source.storage.readers
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="iwm-fast read") if readers > 1 else None
        self._coming: dict[int, Future[bytes]] = {}

    def ask(self, files: list[int]) -> None:
        """Begin to read files that `get` will soon be called for, several at a time."""
        if self._readers is None:
            return
        for file in files:
            if file not in self._kept and file not in self._coming and self._state[file] != _BAD:
                self._coming[file] = self._readers.submit(self.images.read, file)

    def close(self) -> None:
        """Let go of what is still being read; nothing is waited for any more."""
        self._closed.set()
        self._coming.clear()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def get(self, file: int) -> Encoded:
        """The file, ready for DALI; BadSample where it cannot be decoded."""
        kept = self._kept.get(file)
        if kept is not None:
            return kept
        if self._state[file] == _BAD:
            raise BadSample(self._reasons[file])
        try:
            encoded = self._read(file)
        except BadSample as bad:
            self.refuse(file, bad.reason)
            raise
        if self._keeps and self._kept_bytes + len(encoded.data) <= KEPT_BYTES:
            self._kept[file] = encoded
            self._kept_bytes += len(encoded.data)
        return encoded

    def refuse(self, file: int, reason: str) -> None:
        """Remember that the file cannot be decoded."""
        self._state[file] = _BAD
        self._reasons[file] = reason
        self._forget(file)

    def use_pillow(self, file: int) -> None:
        """Remember that DALI refuses the file and Pillow decodes it."""
        self._state[file] = _REENCODED
        self._forget(file)

    def _forget(self, file: int) -> None:
        kept = self._kept.pop(file, None)
        if kept is not None:
            self._kept_bytes -= len(kept.data)

    def _fetch(self, file: int) -> bytes:
        coming = self._coming.pop(file, None)
        return self.images.read(file) if coming is None else coming.result()

    def _read(self, file: int) -> Encoded:
        raw = read_present(lambda: self._fetch(file), self.wait_s, self._closed)
        if self._state[file] == _REENCODED:
            return reencode(raw, self.max_pixels)
        if self._state[file] == _PLAIN and self._length[file] == len(raw):
            size = int(self._width[file]), int(self._height[file])
            return Encoded(np.frombuffer(raw, np.uint8), *size, orientation=int(self._orientation[file]))
        encoded = inspect(raw, self.max_pixels)
        self._state[file] = _REENCODED if encoded.lossless else _PLAIN
        self._width[file], self._height[file], self._length[file] = encoded.width, encoded.height, len(raw)
        self._orientation[file] = encoded.orientation
        return encoded


@dataclass
class Samples:
    """B samples with the files that stand for them: files[i] is ids[i] unless that one is bad. size: int64 (B, 2)."""

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    files: NDArray[np.int64]
    encoded: list[Encoded]

    @property
    def size(self) -> NDArray[np.int64]:
        """Width and height of the upright images."""
        return np.array([(one.width, one.height) for one in self.encoded], np.int64).reshape(-1, 2)


class SampleReader:
    """Samples by id, bad files replaced: a function of (seed, epoch, id) and of which files are bad, nothing else."""

    def __init__(self, store: FileStore, seed: int, bad: BadSamples) -> None:
        self.store, self.seed, self.bad = store, seed, bad

    def read(self, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> Samples:
        """The samples of a batch. UserError where too many files are bad."""
        files = ids.copy()
        encoded = []
        self.store.ask(ids.tolist())
        for row, file in enumerate(ids.tolist()):
            try:
                encoded.append(self.store.get(file))
            except BadSample as bad:
                self.bad.add(self.store.images.name(file), bad.reason, int(epochs[row]), file)
                files[row], replacement = self._replacement(file, int(epochs[row]))
                encoded.append(replacement)
        self.bad.tried(ids.tolist())
        self.bad.check()
        return Samples(ids, epochs, files, encoded)

    def replace(self, samples: Samples, reasons: dict[int, str]) -> Samples:
        """The same batch after its rows in `reasons` were found bad by decoding them."""
        files, encoded = samples.files.copy(), list(samples.encoded)
        for row, reason in reasons.items():
            file, epoch, sample = int(files[row]), int(samples.epochs[row]), int(samples.ids[row])
            self.store.refuse(file, reason)
            self.bad.add(self.store.images.name(file), reason, epoch, sample)
        for row in reasons:
            files[row], encoded[row] = self._replacement(int(samples.ids[row]), int(samples.epochs[row]))
        self.bad.check()
        return Samples(samples.ids, samples.epochs, files, encoded)

    def _replacement(self, sample: int, epoch: int) -> tuple[int, Encoded]:
        """Another file for a bad one: the first good one of `candidates`."""
        for file in candidates(self.seed, epoch, sample, len(self.store.images)):
            self.bad.tried([file])
            try:
                return file, self.store.get(file)
            except BadSample as bad:
                self.bad.add(self.store.images.name(file), bad.reason, epoch, sample)
                self.bad.check()
        raise self.bad.all_bad()


def candidates(seed: int, epoch: int, sample: int, count: int) -> Iterator[int]:
    """What may stand for a bad sample of `count`, in order: counter-based draws, then all others after it."""
    drawn = uniforms(seed, epoch, sample, REPLACEMENT, _CANDIDATES)[0]
    yield from (int(draw * count) for draw in drawn)
    yield from ((sample + step) % count for step in range(1, count))
