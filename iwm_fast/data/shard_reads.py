"""Read the shards of a rank's streams from front to back, ahead of the samples that are taken.

A window's samples are next to each other in one shard or a few (`shard_order`). They are read by ranges of up to 8 MiB
by threads, while earlier samples are decoded, and each image is cut out and checked there. Requests per image are its
bytes over 8 MiB, or one per window where images are small; the bytes between images (headers, padding, labels) are read
with them.

A stream holds its window and a quarter of the next one, at most a range more, so a rank streams / ranks times that.
With the defaults and images of 110 KB these are up to 2.8 GB on one rank, and 0.35 GB on each of 8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.shard_order import ShardOrder
from iwm_fast.data.sources import DataGone, Storage
from iwm_fast.data.sources.base import Packed

__all__ = ["LONGEST", "Coming", "ReadPlan", "ShardReads"]

# Bytes of a range. At 50 to 100 MB/s per connection to an object store 8 MiB take 80 to 160 ms, several times the
# latency of a request; larger ones would only hold more memory.
LONGEST = 8 * 2**20
# Bytes without an image that are read rather than split a range: labels and masks beside images.
_GAP = 256 * 2**10
# Share of a window that is read ahead of it.
_AHEAD = 4

# Of a range's samples, each until it is taken; a bad one has the reason.
Images = list[bytes | BadSample | None]


@dataclass(frozen=True)
class ReadPlan:
    """What a rank reads: its streams of an order, from the global position `start` on."""

    order: ShardOrder
    rank: int = 0
    world: int = 1
    start: int = 0


@dataclass
class _Range:
    """A range of a file, and each sample's place in it: (sample, first byte, bytes)."""

    file: str
    offset: int
    length: int
    samples: list[tuple[int, int, int]]
    read: Future[Images] | None = None


@dataclass
class _Stream:
    """position: of the first sample whose window is not planned. held: samples that are planned and not taken.

    expected: where each sample's bytes come from, epoch by epoch. Of this stream alone: another one may have the sample
    in another epoch, and be further.
    """

    position: int
    held: int = 0
    planned: deque[_Range] = field(default_factory=deque)
    expected: dict[int, deque[tuple[_Range | None, int]]] = field(default_factory=dict)

    def expect(self, sample: int, wanted: _Range | None, place: int) -> None:
        """Note where a sample's bytes come from: None, where they are not read ahead."""
        self.expected.setdefault(sample, deque()).append((wanted, place))

    def took(self, sample: int) -> tuple[_Range | None, int]:
        """Return where the bytes of the sample that is taken now come from."""
        known = self.expected[sample]
        found = known.popleft()
        if not known:
            del self.expected[sample]
        self.held -= 1
        return found


class Coming:
    """A sample's bytes, which may still be on their way."""

    def __init__(self, reads: ShardReads, found: _Range, place: int) -> None:
        self._reads, self._range, self._place = reads, found, place

    def result(self) -> bytes:
        """Wait for the bytes, and hand them over. Raises BadSample, UserError and DataGone as `Source.read`.

        After DataGone `result` may be called again. It reads the range anew, as it does where that failed before the
        first call: the data may be back.
        """
        read = self._range.read
        assert read is not None
        if read.done() and isinstance(read.exception(), DataGone):
            read = self._reads.submit(self._range)
        found = read.result()
        raw, found[self._place] = found[self._place], None
        assert raw is not None
        if isinstance(raw, BadSample):
            raise raw
        return raw


class ShardReads:
    """Samples of a `ReadPlan` by their order. `take` is called by one thread.

    skip: whether a sample's bytes are not needed. judge: called with each sample and its bytes, by a reading thread.
    """

    def __init__(
        self,
        source: Packed,
        storage: Storage,
        plan: ReadPlan,
        readers: int,
        *,
        skip: Callable[[int], bool],
        judge: Callable[[int, bytes], None],
    ) -> None:
        self._source, self._storage, self._order = source, storage, plan.order
        self._skip, self._judge = skip, judge
        count = plan.order.streams
        firsts = (plan.start + (stream - plan.start) % count for stream in range(plan.rank, count, plan.world))
        self._streams = [_Stream(first) for first in firsts]
        # A rank's positions are those of its streams in turn, from the first one's on.
        self._turn = cycle(sorted(self._streams, key=lambda stream: stream.position))
        self._begun = False
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="iwm-fast read")

    def take(self, sample: int) -> Coming | None:
        """Return the sample at the rank's next position, and read on; None where its bytes are not read ahead."""
        window = self._order.window
        if not self._begun:
            self._begun = True
            for stream in self._streams:  # each one's first window before any second
                self._fill(stream, window)
        stream = next(self._turn)
        found, place = stream.took(sample)
        self._fill(stream, window + max(1, window // _AHEAD))
        return None if found is None else Coming(self, found, place)

    def submit(self, wanted: _Range) -> Future[Images]:
        """Read a range, now or again."""
        wanted.read = self._readers.submit(self._read, wanted)
        return wanted.read

    def close(self) -> None:
        """Drop what is not read yet."""
        for stream in self._streams:
            stream.expected.clear()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _fill(self, stream: _Stream, samples: int) -> None:
        """Read on until so many samples of the stream are held."""
        while stream.held < samples:
            if not stream.planned:
                self._plan(stream)
            if stream.planned:
                wanted = stream.planned.popleft()
                self.submit(wanted)
                stream.held += len(wanted.samples)

    def _plan(self, stream: _Stream) -> None:
        """Plan the rest of the stream's window, in the order of its files' bytes."""
        count = self._order.left_in_window(stream.position)
        positions = stream.position + self._order.streams * np.arange(count, dtype=np.int64)
        stream.position += self._order.streams * count
        spans = []
        for sample in sorted(self._order.at(positions).tolist()):
            span = None if self._skip(sample) else self._source.span(sample)
            if span is None or span[2] <= 0:
                stream.expect(sample, None, 0)
                stream.held += 1
            else:
                spans.append((*span, sample))
        stream.planned.extend(_ranges(spans))
        for wanted in stream.planned:
            for place, (sample, _, _) in enumerate(wanted.samples):
                stream.expect(sample, wanted, place)

    def _read(self, wanted: _Range) -> Images:
        """The samples of a range, or why they are bad. Runs on a reading thread."""
        raw = memoryview(self._storage.read(wanted.file, wanted.offset, wanted.length))
        found: Images = []
        for sample, first, length in wanted.samples:
            try:
                image = self._source.unpack(sample, bytes(raw[first : first + length]))
            except BadSample as bad:
                found.append(bad)
                continue
            self._judge(sample, image)
            found.append(image)
        return found


def _ranges(spans: list[tuple[str, int, int, int]]) -> list[_Range]:
    """Join the spans (file, offset, length, sample) of a window where they are next to each other."""
    places = {file: place for place, file in reversed(list(enumerate(file for file, _, _, _ in spans)))}
    found: list[_Range] = []
    for file, offset, length, sample in sorted(spans, key=lambda span: (places[span[0]], span[1])):
        last = found[-1] if found else None
        end = offset + length
        if (
            last is None
            or last.file != file
            or offset > last.offset + last.length + _GAP
            or end - last.offset > max(LONGEST, last.length)
        ):
            last = _Range(file, offset, 0, [])
            found.append(last)
        last.samples.append((sample, offset - last.offset, length))
        last.length = max(last.length, end - last.offset)
    return found
