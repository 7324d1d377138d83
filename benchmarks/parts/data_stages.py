"""CPU seconds per image and core of making two views, by stage; each stage includes those before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from iwm_fast.actions.transforms import Jitter, Views
from iwm_fast.benchmarks.parts.data_job import Job
from iwm_fast.data.decode.encoded import Encoded, inspect
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.measure.timing import spread

__all__ = ["stages"]


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1, set_affinity=False)
def _decoder(cropped: bool, device: str) -> Any:
    data = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
    where = "mixed" if device == "gpu" else "cpu"
    if not cropped:
        return fn.decoders.image(data, device=where, adjust_orientation=False)
    start, shape = (fn.external_source(name=n, batch=True, dtype=types.INT32, ndim=1) for n in ("start", "shape"))
    return fn.decoders.image_slice(
        data, start=start, shape=shape, axis_names="WH", device=where, adjust_orientation=False
    )


class _Decoding:
    """DALI's decoder alone: the floor of every pipeline that decodes with it."""

    def __init__(self, job: Job, *, cropped: bool) -> None:
        self.cropped = cropped
        self.pipeline = _decoder(
            cropped, job.device, batch_size=job.batch, num_threads=1, device_id=0 if job.device == "gpu" else None
        )
        self.pipeline.build()

    def __call__(self, encoded: list[Encoded], views: Views) -> None:
        self.pipeline.feed_input("encoded", [one.data for one in encoded])
        if self.cropped:
            crop = views.target_geometry.crop.astype(np.int32)
            self.pipeline.feed_input("start", np.ascontiguousarray(crop[:, :2]))
            self.pipeline.feed_input("shape", np.ascontiguousarray(crop[:, 2:]))
        self.pipeline.run()


def _plain(views: Views) -> Views:
    """Views without colour changes."""
    count = len(views)
    return replace(_jittered(views), target=Jitter.neutral(count), source=Jitter.neutral(count))


def _jittered(views: Views) -> Views:
    """Views with geometry and jitter only."""
    return views.uncorrupted()


def _groups(job: Job, repeat: int) -> Iterator[tuple[list[Any], Views]]:
    """Yield the paths and parameters of each batch of a repeat."""
    paths, views = job.drawn(repeat)
    for first in range(0, job.batch * job.count, job.batch):
        rows = np.arange(first, first + job.batch)
        yield [paths[row] for row in rows.tolist()], views.take(rows)


def stages(job: Job, repeats: int) -> list[dict[str, Any]]:
    """Return rows of {stage, seconds per image of each repeat, p20, p50, p80}; stages take turns within a repeat."""
    limit = 2**31 - 1
    graph = ViewGraph(job.size, job.batch, job.device, 1, geometric=False, bases=False)  # as in training
    whole, cropped = _Decoding(job, cropped=False), _Decoding(job, cropped=True)
    steps: dict[str, Callable[[list[Any], list[Encoded], Views], object]] = {
        "read": lambda paths, _, __: [path.read_bytes() for path in paths],
        "read, check the header": lambda paths, _, __: [inspect(path.read_bytes(), limit) for path in paths],
        "decode the whole image (floor)": lambda _, encoded, views: whole(encoded, views),
        "decode the crop": lambda _, encoded, views: cropped(encoded, views),
        "+ resize, flip": lambda _, encoded, views: graph.run(encoded, _plain(views)),
        "+ both jitters": lambda _, encoded, views: graph.run(encoded, _jittered(views)),
        "+ grayscale, blur, solarize": lambda _, encoded, views: graph.run(encoded, views),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-1, repeats):  # the first is a warm-up
        groups = [
            (paths, [inspect(p.read_bytes(), limit) for p in paths], v) for paths, v in _groups(job, max(repeat, 0))
        ]
        for name, step in steps.items():
            begin = time.process_time()
            for group in groups:
                step(*group)
            if repeat >= 0:
                taken[name].append((time.process_time() - begin) / (job.batch * job.count))
    graph.close()
    return [{"stage": name, "seconds": seconds, **spread(seconds)} for name, seconds in taken.items()]
