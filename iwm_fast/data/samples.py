"""Read the samples of a batch: check each file once, cache small sets in memory, replace bad files.

The data thread checks a file when it first reads it, a checker (`checkers`) does so before, or the manifest has the
verdict (`iwm-fast data index --check`); all three give the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.checkers import Checkers
from iwm_fast.data.decode.encoded import BadSample, Encoded, inspect, reencode
from iwm_fast.data.decode.verdicts import PILLOW, PLAIN, UNKNOWN, verdict_of, verdict_on
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.known_verdicts import KnownVerdicts
from iwm_fast.data.randomness import REPLACEMENT, uniforms
from iwm_fast.data.shard_reads import Coming, ReadPlan, ShardReads
from iwm_fast.data.sources.base import Packed
from iwm_fast.data.sources.outage import read_present
from iwm_fast.notices import tell_once

__all__ = ["KEPT_BYTES", "FileStore", "SampleReader", "Samples", "candidates"]

# Encoded bytes cached by a process: all of CIFAR-10 (50 MB) or STL-10, the first few thousand of ImageNet.
KEPT_BYTES = 512 * 2**20
# Random replacements tried for a bad sample before taking files in order.
_CANDIDATES = 16

# Threads that read shards ahead on a disk: one reads while the other cuts and checks.
_SHARD_READERS = 2
# Fewest unchecked files for which checkers start: fewer take the data thread no longer than a process takes to start
# (0.3 s).
_WORTH_CHECKERS = 2000


class FileStore:
    """Files by index, ready for DALI. Verdicts are cached, and bytes while they are few.

    A plain file is only read on later visits; its header is checked again if its length changed. wait_s: seconds to
    wait for missing data. readers: files read concurrently, by default what suits their storage. keep: whether to cache
    bytes. checkers: processes that check files of `expect`; none for an object store, where each file would be
    transferred twice: there the readers check what they read. plan: the order of all later calls of `ask`, whose shards
    are read ahead of it; the readers check what they read.
    """

    def __init__(
        self,
        images: ImageSet,
        max_pixels: int,
        wait_s: float = 0.0,
        *,
        readers: int | None = None,
        keep: bool = True,
        checkers: int = 0,
        plan: ReadPlan | None = None,
    ) -> None:
        self.images, self.max_pixels, self.wait_s = images, max_pixels, wait_s
        self._closed = threading.Event()
        self._known = KnownVerdicts(images, max_pixels)
        self._reasons: dict[int, str] = {}
        self._lost: set[str] = set()  # shards that are gone
        self._kept: dict[int, Encoded] = {}
        self._kept_bytes, self._keeps = 0, keep
        local = images.source.storage.readers == 1
        self._shards: ShardReads | None = None
        self._ahead: dict[int, Coming] = {}
        if plan is not None:
            source, storage = images.source, images.source.storage
            assert isinstance(source, Packed)
            threads = readers or max(_SHARD_READERS, storage.readers)
            self._shards = ShardReads(source, storage, plan, threads, skip=self._needless, judge=self._judge)
            readers = checkers = 0
        else:
            readers = readers or images.source.storage.readers
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="iwm-fast read") if readers > 1 else None
        self._coming: dict[int, Future[bytes]] = {}
        worth = bool(checkers) and local and images.unchecked >= max(1, _WORTH_CHECKERS)
        self._checkers = Checkers(images.source, max_pixels, checkers) if worth else None

    @property
    def looks_ahead(self) -> bool:
        """Whether `expect` has an effect."""
        return self._checkers is not None

    def expect(self, files: NDArray[np.int64]) -> None:
        """Check those of the files that have no verdict: `ask` and `get` will be called for them later."""
        if self._checkers is not None:
            self._checkers.ask(self.images.source_rows(self._known.unknown(files)))

    def ask(self, files: list[int]) -> None:
        """Start reading files that `get` will need soon, several concurrently; wait for the checkers' verdicts."""
        if self._checkers is not None:
            rows = self.images.source_rows(self._known.unknown(np.array(files, np.int64)))
            for found, verdicts in self._checkers.answers(rows):
                for sample, verdict in zip(self.images.samples_of(found).tolist(), verdicts, strict=True):
                    if self._known[sample][0] == UNKNOWN:  # else this thread has checked a replacement meanwhile
                        self._known[sample] = verdict.item()
        for file in files:
            if self._shards is not None:
                coming = self._shards.take(file)
                if coming is not None and not self._needless(file):
                    self._ahead[file] = coming
            elif self._readers is not None and file not in self._coming and not self._needless(file):
                self._coming[file] = self._readers.submit(self._load, file)

    def close(self) -> None:
        """Drop what is still being read."""
        self._closed.set()
        if self._checkers is not None:
            self._checkers.close()
        if self._shards is not None:
            self._shards.close()
        self._coming.clear()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def get(self, file: int) -> Encoded:
        """Return the file, ready for DALI; BadSample where it cannot be decoded."""
        try:
            return self._get(file)
        finally:
            self._ahead.pop(file, None)

    def _get(self, file: int) -> Encoded:
        kept = self._kept.get(file)
        if kept is not None:
            return kept
        if file in self._reasons:
            raise BadSample(self._reasons[file])
        try:
            encoded = self._read(file)
        except BadSample as bad:
            self.refuse(file, bad.reason)
            self._tell_of_lost_shard(file)
            raise
        if self._keeps and self._kept_bytes + len(encoded.data) <= KEPT_BYTES:
            self._kept[file] = encoded
            self._kept_bytes += len(encoded.data)
        return encoded

    def refuse(self, file: int, reason: str) -> None:
        """Mark the file as undecodable."""
        self._reasons[file] = reason
        self._forget(file)

    def use_pillow(self, file: int) -> None:
        """Mark that DALI rejects the file and Pillow decodes it."""
        self._known.use_pillow(file)
        self._forget(file)

    def _tell_of_lost_shard(self, file: int) -> None:
        """Report once that a shard or TFRecord file is gone, of which each sample is bad."""
        source = self.images.source
        if source.kind not in ("webdataset", "tfrecord"):
            return
        try:
            piece = source.extent(self.images.row(file))[0]
        except BadSample:  # a record cannot be read for its place
            piece = self.images.source_name(file).rpartition(":")[0]
        if piece not in self._lost and not source.storage.has(piece):
            self._lost.add(piece)
            tell_once(
                f"{source.storage.shown(piece)}: is gone; each of its samples counts as bad and another takes its "
                "place: bring it back and start again, or index again without it"
            )

    def _forget(self, file: int) -> None:
        kept = self._kept.pop(file, None)
        if kept is not None:
            self._kept_bytes -= len(kept.data)

    def _load(self, file: int) -> bytes:
        """The file's bytes, and a verdict where there is none yet. Runs on a reader's thread."""
        raw = self.images.read(file)
        self._judge(file, raw)
        return raw

    def _judge(self, file: int, raw: bytes) -> None:
        """Have a verdict on a file. Runs on a reader's thread."""
        if self._known[file][0] == UNKNOWN:
            self._known[file] = verdict_on(raw, self.max_pixels)

    def _needless(self, file: int) -> bool:
        """Whether a file need not be read."""
        return file in self._kept or file in self._reasons

    def _fetch(self, file: int) -> bytes:
        ahead = self._ahead.get(file)
        if ahead is not None:
            return ahead.result()
        coming = self._coming.pop(file, None)
        return self.images.read(file) if coming is None else coming.result()

    def _read(self, file: int) -> Encoded:
        raw = read_present(lambda: self._fetch(file), self.wait_s, self._closed)
        state, orientation, width, height, length = self._known[file]
        if state == PILLOW:
            return reencode(raw, self.max_pixels)
        if state == PLAIN and length == len(raw):
            return Encoded(np.frombuffer(raw, np.uint8), width, height, orientation)
        encoded = inspect(raw, self.max_pixels)
        self._known[file] = verdict_of(encoded, len(raw))
        return encoded


@dataclass
class Samples:
    """B samples with their files: files[i] is ids[i] unless that one is bad. size: int64 (B, 2)."""

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

    def expect(self, ids: NDArray[np.int64]) -> None:
        """Have the samples of a batch checked that `read` will later be called for."""
        self.store.expect(ids)

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
