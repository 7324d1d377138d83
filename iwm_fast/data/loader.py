"""The endless stream of micro-batches for training, prepared by a thread.

Images, order, view parameters and masks are a function of (seed, position in the stream) alone: global position p is
sample `order.shuffled(seed, p // n, n, p % n)` of epoch p // n. World size, micro-batch, threads and prefetching only
divide that order among ranks and batches, so a run can resume at any position on any of them. `shard_order` is the
other order, of data in shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.ranges import corruptions_drawn
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Views
from iwm_fast.config.batch import divide_batch
from iwm_fast.config.schema import Config
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.batch import Batch
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.masks import PatchSets, mask_sampler
from iwm_fast.data.order import FEISTEL
from iwm_fast.data.samples import FileStore, SampleReader, Samples
from iwm_fast.data.shard_order import ShardOrder, order_of_samples
from iwm_fast.data.shard_reads import ReadPlan
from iwm_fast.data.views.devices import dali_device, dali_threads, image_checkers, use_gpu
from iwm_fast.data.views.graph import BadRows, RenderedViews, ViewGraph
from iwm_fast.data.views.sampling import draw_views

__all__ = ["TrainingStream"]

# Batches in the graph: one computing, one waiting, so that no thread waits for Python. On a CPU two compute: DALI
# decodes one and renders the other.
_IN_GRAPH = {"cpu": 3, "gpu": 2}
# Batches that checkers see before the one that is read.
_EXPECTED = 2


@dataclass
class _Share:
    """The samples and masks of a micro-batch, before reading."""

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    patches: PatchSets
    global_context: int
    global_target: int


@dataclass
class _InFlight:
    """A micro-batch inside DALI, with all that the host knows of it."""

    samples: Samples
    views: Views
    patches: PatchSets
    global_context: int
    global_target: int


class TrainingStream:
    """Endless iterator of `Batch`: `rank` of `world` gets its share of each global batch, in micro-batches: contiguous
    samples, or with ``data.order: shard`` every world-th one, which are those of its streams.

    start: global samples already consumed. run_dir: folder of bad_samples.jsonl, if any. accumulation: micro-batches
    per rank and global batch, each of micro_batch images. An error in the background thread (UserError where too many
    files are bad) is raised by the `next` of its batch, and by every later one. Close it, or use it as a context
    manager. order: which of `order.ORDERS`, where ``data.order`` is sample. `triplet_stream.PairStream` is the one for
    triplets.
    """

    _bases = False  # nothing that training needs

    def __init__(
        self,
        config: Config,
        files: Sized,
        space: ActionSpace,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        run_dir: Path | None = None,
        order: str = FEISTEL,
    ) -> None:
        self.micro_batch, self.accumulation = divide_batch(config.train.global_batch, world, config.train.micro_batch)
        self.device = dali_device(config.data.device)
        self._config, self._space, self._rank, self._world, self._start = config, space, rank, world, start
        self._order = order_of_samples(config, files, world, order)
        self._reader = self._reader_of(files, run_dir)
        geometric = config.actions.geometric
        self._sources = config.views.sources_per_target
        self._masks = mask_sampler(config)
        self._graph = ViewGraph(
            config.model.image,
            self.micro_batch * self.files_a_sample,
            self.device,
            dali_threads(config.data.threads, world),
            geometric=geometric,
            sources=self._sources,
            corruptions=[corruption.name for corruption in corruptions_drawn(config.actions)],
            max_pixels=config.data.max_pixels,
            bases=self._bases,
            hw_decoder_load=config.data.hw_decoder_load,
        )
        self._failure: BaseException | None = None
        self._batches = self._prepare()
        # One thread, so that batches are made in order. It does only what has been requested, and ends by itself.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="iwm-fast data", initializer=use_gpu, initargs=(self._graph.device_id,)
        )
        self._ahead = deque(self._ask() for _ in range(config.data.prefetch))

    @property
    def files_a_sample(self) -> int:
        """The most files that a sample shows."""
        return 1

    @property
    def order(self) -> str:
        """Which order the samples come in, for checkpoints."""
        return self._order.kind

    @property
    def streams(self) -> dict[str, int | str] | None:
        """What else determines the order, for checkpoints; None where nothing does."""
        return self._order.facts() if isinstance(self._order, ShardOrder) else None

    @property
    def bad(self) -> int:
        """The number of undecodable files that this rank has met so far (ahead of training by the prefetch)."""
        return len(self._reader.bad)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        self._ahead.append(self._ask())
        asked = self._ahead.popleft()
        self._failure = asked.exception()  # waits
        if self._failure is not None:
            raise self._failure
        batch = asked.result()
        if self.device == "gpu":  # the thread's stream need not be this one
            for tensor in (batch.source, batch.target):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return batch

    def close(self) -> None:
        """End the thread and drop prepared batches; `next` raises after that."""
        self._reader.store.close()  # first: the thread may be waiting for data
        self._reader.store.images.source.storage.close()
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._graph.close()
        self._failure = self._failure or ValueError("this TrainingStream is closed")

    def __enter__(self) -> TrainingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reader_of(self, files: Sized, run_dir: Path | None) -> SampleReader:
        assert isinstance(files, ImageSet)
        bad = BadSamples(len(files), self._config.data.max_bad_fraction, run_dir)
        return SampleReader(self._store_of(files), self._config.train.seed, bad)

    def _store_of(self, files: ImageSet) -> FileStore:
        data = self._config.data
        checkers = image_checkers(data.checkers, self.device, self._world)
        order, plan = self._order, None
        if isinstance(order, ShardOrder):
            plan = ReadPlan(order, self._rank, self._world, self._start)
        return FileStore(files, data.max_pixels, data.wait_s, readers=data.readers, checkers=checkers, plan=plan)

    def _ask(self) -> Future[Batch]:
        return self._thread.submit(next, self._batches)

    def _prepare(self) -> Iterator[Batch]:
        """Keep DALI busy, and yield finished batches in order. Runs in the thread."""
        underway: deque[_InFlight] = deque()
        for batch in self._plan():
            self._graph.submit(batch.samples.encoded, batch.views)
            underway.append(batch)
            if len(underway) == _IN_GRAPH[self.device]:
                yield self._finish(underway.popleft())

    def _plan(self) -> Iterator[_InFlight]:
        """The rank's micro-batches, read, with sampled parameters, before any pixel is decoded."""
        expected = _EXPECTED if self._reader.store.looks_ahead else 0
        coming: deque[_Share] = deque()
        for share in self._shares():
            self._reader.expect(share.ids)
            coming.append(share)
            if len(coming) <= expected:
                continue
            batch = coming.popleft()
            samples = self._reader.read(batch.ids, batch.epochs)
            yield _InFlight(samples, self._draw(samples), batch.patches, batch.global_context, batch.global_target)

    def _shares(self) -> Iterator[_Share]:
        size, position = self._config.train.global_batch, self._start
        share = self.micro_batch * self.accumulation
        while True:
            ids, epochs = self._order(position, position + size)
            if isinstance(self._order, ShardOrder):
                ids, epochs = (column.reshape(-1, self._world).T.reshape(-1) for column in (ids, epochs))
            patches = self._masks.draw(epochs, ids)
            totals = int(patches.context_lengths.sum()), self._predicted(ids, patches)
            for first in range(self._rank * share, (self._rank + 1) * share, self.micro_batch):
                rows = slice(first, first + self.micro_batch)
                masks = slice(rows.start * self._sources, rows.stop * self._sources)
                yield _Share(ids[rows], epochs[rows], _rows_of(patches, masks), *totals)
            position += size

    def _predicted(self, ids: NDArray[np.int64], patches: PatchSets) -> int:
        """The tokens to predict of a global batch."""
        del ids
        return int(patches.target_lengths.sum())

    def _draw(self, samples: Samples) -> Views:
        actions, seed = self._config.actions, self._config.train.seed
        return draw_views(actions, seed, samples.epochs, samples.ids, samples.size, sources=self._sources)

    def _finish(self, batch: _InFlight) -> Batch:
        rendered = self._collect(batch)
        source, target, action = self._pairs(rendered, batch.samples, batch.views)
        return Batch(
            source=source,
            target=target,
            action=self._pinned(action),
            patches=batch.patches,
            ids=batch.samples.ids,
            epochs=batch.samples.epochs,
            global_context=batch.global_context,
            global_target=batch.global_target,
            steps=self._steps(batch.samples),
        )

    def _steps(self, samples: Samples) -> NDArray[np.int64] | None:
        """As in `Batch`."""
        del samples
        return None

    def _pinned(self, array: NDArray[np.float32]) -> torch.Tensor:
        """On the host; for a GPU in pinned memory, so that the copy does not block the step."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device == "gpu" else tensor

    def _pairs(
        self, rendered: RenderedViews, samples: Samples, views: Views
    ) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
        """Sources and targets (B, S, S, 3) and actions (B, A)."""
        del samples
        return rendered.source, rendered.target, self._space.encode(views)

    def _collect(self, batch: _InFlight) -> RenderedViews:
        """The oldest batch's views; files that fail to decode are replaced, with newly sampled parameters."""
        while True:
            try:
                rendered = self._graph.collect()
            except BadRows as bad:
                batch.samples = self._reader.replace(batch.samples, bad.reasons)
                batch.views = self._draw(batch.samples)
                self._graph.replace(batch.samples.encoded, batch.views)
                continue
            for row in rendered.lossless:
                self._reader.store.use_pillow(int(batch.samples.files[row]))
            return rendered


def _rows_of(patches: PatchSets, rows: slice) -> PatchSets:
    """The patches of a run of images."""
    return PatchSets(
        *_packed_rows(patches.context, patches.context_lengths, rows),
        *_packed_rows(patches.target, patches.target_lengths, rows),
    )


def _packed_rows(
    packed: NDArray[np.int64], lengths: NDArray[np.int64], rows: slice
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, last = int(lengths[: rows.start].sum()), int(lengths[: rows.stop].sum())
    return packed[first:last], lengths[rows]
