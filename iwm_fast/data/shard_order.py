"""The order of samples that reads shards from front to back (``data.order: shard``).

An epoch of n samples has the global positions epoch · n to (epoch + 1) · n, as in `order`: nothing is left over at its
end, and a batch may hold the end of one epoch and the beginning of the next. Within an epoch:

1. **The shards are permuted** by (seed, epoch), and their samples stand one after the other, each shard's in its own
   order.
2. **This sequence is dealt to S streams** as S runs of ⌊n / S⌋ or ⌈n / S⌉ consecutive samples. Streams of whole shards
   would have unequal lengths, and some would end early; here a run begins and ends within a shard, so that at most
   S − 1 shards are read by two streams, each its own part. Global position p is of stream p mod S, so every batch of a
   multiple of S samples takes equal shares of all streams, and rank r of W has the streams r, r + W, …, which are the
   positions p = r mod W. The ⌈n / S⌉ − ⌊n / S⌋ = 1 sample more goes to streams that other epochs choose otherwise.
3. **A stream is shuffled in windows**: its run is cut into windows of at most `window` samples, whose lengths differ
   by one at most, and each is permuted by a bijection keyed by (seed, epoch, stream, window). A buffer that is refilled
   sample by sample, as is usual, has a state that only a replay from its beginning gives; this one has none: the sample
   of a position is a function of (seed, position) alone, so that a resume needs the position only, at any number of
   ranks. Both need the memory of one buffer. A sample moves by less than a window; the mixture of a batch comes from
   its S streams, which are S random places of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from iwm_fast.config.schema import Config
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.order import ROUNDS, SHARDED, SampleOrder, permuted
from iwm_fast.data.randomness import SHARDS, WINDOWS, words
from iwm_fast.data.sources.base import Packed, Source
from iwm_fast.errors import UserError

__all__ = ["Order", "ShardOrder", "order_of_samples", "require_streams", "shard_order"]

Ids = NDArray[np.int64]

_PACK = "pack the images with iwm-fast data shard, or set data.order=sample"


class Order(Protocol):
    """Sample ids and epochs by global position. kind: its name, as checkpoints record it."""

    seed: int
    count: int
    kind: str

    def __call__(self, start: int, stop: int) -> tuple[Ids, Ids]:
        """Return (ids, epochs) of the positions start to stop, int64 each."""
        ...


class ShardOrder:
    """The order described above. sizes: samples of each shard, in the order of the sample ids.

    Its memory is that of a few numbers per shard. A sample takes 0.5 µs in a batch of 1,024, 0.2 µs in one of 16,384.
    """

    kind = SHARDED

    def __init__(self, seed: int, sizes: Ids, streams: int, window: int) -> None:
        if streams < 1 or window < 1 or not np.sum(sizes):
            raise ValueError(f"streams is {streams}, window {window}, samples {np.sum(sizes)}; all must be 1 or more")
        self.seed, self.streams, self._most = seed, streams, window
        self._firsts, self._sizes = np.cumsum(sizes) - sizes, np.asarray(sizes, np.int64)
        self.count, self.shards = int(np.sum(sizes)), len(sizes)
        self.window = min(window, -(-self.count // streams))  # its longest
        self._epochs: dict[int, tuple[Ids, Ids]] = {}

    def __call__(self, start: int, stop: int) -> tuple[Ids, Ids]:
        """Return (ids, epochs) of the positions start to stop, int64 each."""
        positions = np.arange(start, stop, dtype=np.int64)
        return self.at(positions), positions // self.count

    def at(self, positions: Ids) -> Ids:
        """Return the samples of any positions, int64 (B,)."""
        epochs = positions // self.count
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            found[rows] = self._samples(epoch, positions[rows] - epoch * self.count)
        return found

    def facts(self) -> dict[str, int | str]:
        """Return what the order depends on besides the seed: streams, window, shards, and a digest of their sizes."""
        digest = hashlib.sha256(self._sizes.astype("<i8").tobytes()).hexdigest()
        return {"streams": self.streams, "window": self._most, "shards": self.shards, "sizes": digest}

    def left_in_window(self, position: int) -> int:
        """Return how many of a stream's positions, this one included, are left in its window."""
        epoch, offset = divmod(position, self.count)
        _, _, first, size, place = self._windows(epoch, np.array([offset], np.int64))
        return int((first + size - place)[0])

    def _samples(self, epoch: int, offsets: Ids) -> Ids:
        names, begins, first, size, place = self._windows(epoch, offsets)
        known, of = np.unique(names, return_inverse=True)
        keys = words(self.seed, epoch, known, WINDOWS, ROUNDS).T
        places = begins + first + permuted(keys[:, of], size, place - first)
        order, ends = self._shards(epoch)
        shard = np.searchsorted(ends, places, side="right")
        found: Ids = self._firsts[order][shard] + places - (ends - self._sizes[order])[shard]
        return found

    def _windows(self, epoch: int, offsets: Ids) -> tuple[Ids, Ids, Ids, Ids, Ids]:
        """For positions in an epoch, int64 (B,) each: the window's name; where its stream begins in the epoch's
        sequence; in the stream, the window's beginning; its length; and in the stream, the position's place.
        """
        place, turn = np.divmod(offsets, self.streams)
        least, more = divmod(self.count, self.streams)
        begins = turn * least + np.minimum(turn, more)
        length = least + (turn < more)
        windows = -(-length // self._most)
        window = ((place + 1) * windows - 1) // length
        first = window * length // windows
        size = (window + 1) * length // windows - first
        stream = (turn + epoch * self.count % self.streams) % self.streams
        return stream << 40 | window, begins, first, size, place

    def _shards(self, epoch: int) -> tuple[Ids, Ids]:
        """The shards of an epoch in order, and where each ends in the epoch's sequence."""
        if epoch not in self._epochs:
            count = len(self._sizes)
            keys = np.broadcast_to(words(self.seed, epoch, 0, SHARDS, ROUNDS).T, (ROUNDS, count))
            order = permuted(keys, np.full(count, count, np.int64), np.arange(count, dtype=np.int64))
            last = list(self._epochs.items())[-1:]
            self._epochs = {**dict(last), epoch: (order, np.cumsum(self._sizes[order]))}
        return self._epochs[epoch]


def order_of_samples(config: Config, files: Sized, world: int, kind: str) -> Order:
    """Return the order of a training's samples; kind: of those of ``data.order: sample``. Raises UserError as
    `require_streams`.
    """
    if config.data.order == "sample":
        return SampleOrder(config.train.seed, len(files), kind)
    order = shard_order(config, files, config.train.seed)
    _require(config, files, order.shards, world)
    return order


def shard_order(config: Config, files: Sized, seed: int) -> ShardOrder:
    """Return the order of ``data.order: shard``. Raises UserError where the images are in no shards."""
    return ShardOrder(seed, _sizes(files), config.data.streams, config.data.shuffle_window)


def require_streams(config: Config, files: Sized, world: int) -> None:
    """Raise UserError where ``data.order`` is shard and the images are in no shards, or ``data.streams`` does not fit
    their number, the ranks or the global batch.
    """
    if config.data.order == "shard":
        _require(config, files, len(_sizes(files)), world)


def _require(config: Config, files: Sized, shards: int, world: int) -> None:
    assert isinstance(files, ImageSet)
    streams, batch = config.data.streams, config.train.global_batch
    if streams > shards:
        wrong = f"more than the {shards:,} shards of {files.source.storage.root}"
    elif streams % world:
        wrong = f"which {world} ranks cannot share evenly"
    elif batch % streams:
        wrong = f"which does not divide train.global_batch ({batch})"
    else:
        return
    fitting = [count for count in range(world, min(shards, batch) + 1, world) if batch % count == 0]
    if fitting:
        instead = f"set data.streams={max((c for c in fitting if c <= streams), default=fitting[0])}"
        if streams <= shards and streams % world:
            instead += ", or, to resume a run, launch a number of ranks that divides its streams"
    elif batch % world:
        instead = f"make train.global_batch a multiple of the {world} ranks, or change their number"
    else:
        instead = f"write smaller shards (--shard-size), at least one per rank ({world}), or set data.order=sample"
    raise UserError(f"data.streams is {streams}, {wrong}; {instead}")


def _sizes(files: Sized) -> Ids:
    """Samples of each shard that has any. Raises UserError where there are no shards."""
    if not isinstance(files, ImageSet):
        raise UserError("data.order is shard, and triplets name their images one by one: set data.order=sample")
    source = files.source
    if files.rows is not None or source.kind not in ("webdataset", "tfrecord") or not isinstance(source, Packed):
        raise UserError(
            f"data.order is shard, and {source.storage.root} holds no shards ({source.describe()}): {_PACK}"
        )
    counts = source.shards()
    sizes = np.array(list(counts.values()), np.int64) if counts is not None else _counted(source)
    return sizes[sizes > 0]


def _counted(source: Source) -> Ids:
    """Samples of each run of rows with one file, where the source has no list of them."""
    sizes: list[int] = []
    first = 0
    while first < len(source):
        sizes.append(_end(source, first, sizes[-1] if sizes else 1) - first)
        first += sizes[-1]
    return np.array(sizes, np.int64)


def _end(source: Source, first: int, guess: int) -> int:
    """The row behind the last one of a row's file, by a search that takes two looks where `guess` is its length."""
    file = source.extent(first)[0]

    def inside(row: int) -> bool:
        return row < len(source) and source.extent(row)[0] == file

    low = first + guess - 1 if inside(first + guess - 1) else first
    step = 1
    while inside(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return high
