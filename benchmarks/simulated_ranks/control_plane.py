"""Measure the meeting, the look for lost ranks and the checkpoint's index on simulated ranks."""

from __future__ import annotations

import datetime
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from iwm_fast.benchmarks.simulated_ranks.counted_store import CountedStore
from iwm_fast.benchmarks.simulated_ranks.simulated import PER_HOST, at_once, described, held_by
from iwm_fast.engine.checkpoint.index import FORMAT, read_index
from iwm_fast.engine.checkpoint.writer import layout, places
from iwm_fast.engine.distributed.pulses import Pulse, Pulses, announce
from iwm_fast.engine.distributed.rank_info import meet

__all__ = ["measure_index", "measure_look", "measure_meeting"]

_BEAT_S = 0.5


def measure_meeting(world: int) -> dict[str, Any]:
    """Return calls, keys and bytes that the launcher's store gets and gives when all ranks meet, and seconds."""
    store, infos = CountedStore(), described(world)
    begin = time.perf_counter()
    stores: list[Any] = [store.of(rank) for rank in range(world)]  # with the methods of torch's
    at_once(world, lambda rank: meet(stores[rank], infos[rank], world, datetime.timedelta(minutes=2)))
    return _counted(store) | {"seconds": time.perf_counter() - begin}


def measure_look(world: int) -> dict[str, Any]:
    """Return the same of a look by all ranks but those of one host, which is lost, and the words of it.

    Raises RuntimeError where two ranks differ in them.
    """
    store, infos = CountedStore(), described(world)
    lost = range(world // 2, world // 2 + PER_HOST)
    left = [rank for rank in range(world) if rank not in lost]
    stores: list[Any] = [store.of(rank) for rank in range(world)]  # with the methods of torch's
    ranks = [Pulses(stores[rank], rank, world) for rank in range(world)]
    for rank in range(world):
        announce(stores[rank], rank)
        ranks[rank].publish(Pulse(1, 1, "step 1", infos[rank].host, infos[rank].pid))
    over = threading.Event()

    def beat() -> None:
        beats = 1
        while not over.wait(_BEAT_S):
            beats += 1
            for rank in left:
                ranks[rank].publish(Pulse(beats, 1, "step 1", infos[rank].host, infos[rank].pid))

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    store.reset()
    begin = time.perf_counter()
    words = {found.words for found in at_once(len(left), lambda i: ranks[left[i]].look(_BEAT_S))}
    seconds = time.perf_counter() - begin
    over.set()
    heart.join()
    if len(words) != 1:
        raise RuntimeError(f"ranks differ: {words}")
    return _counted(store) | {"seconds": seconds, "words": words.pop()}


def _counted(store: CountedStore) -> dict[str, Any]:
    return {
        "most_calls_of_a_rank": max(store.calls.values()),
        "calls": sum(store.calls.values()),
        "keys_read": sum(store.keys_read.values()),
        "bytes_read": sum(store.bytes_read.values()),
    }


def measure_index(shapes: dict[str, tuple[int, ...]], world: int, stage: int) -> dict[str, Any]:
    """Return bytes that a rank sends at a checkpoint, bytes of the index, fragments, and seconds of the first rank to
    lay it out and of a rank to read it. Raises RuntimeError where it differs from what the ranks hold.
    """
    held = [held_by(shapes, rank, world, stage) for rank in range(world)]
    reports = [json.dumps(places(own, rank, world, shapes)) for rank, own in enumerate(held)]
    begin = time.perf_counter()
    dealt, listed = layout(shapes, [json.loads(report) for report in reports])
    laid_out = time.perf_counter() - begin
    index = {"format": FORMAT, "step": 1, "updates": 1, "shards": world, "shapes": shapes, "dealt": dealt}
    index |= {"fragments": listed, "headers": {f"rank_{rank:05d}.safetensors": "0" * 64 for rank in range(world)}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.json"
        path.write_text(json.dumps(index))
        size = path.stat().st_size
        begin = time.perf_counter()
        read = read_index(path)
        seconds = time.perf_counter() - begin
    last = {f"{tensor}@{start}": length for tensor, own in held[-1].items() for start, length in own}
    if dict(read.held())[f"rank_{world - 1:05d}.safetensors"] != last:
        raise RuntimeError("the index differs from what the last rank holds")
    return {
        "fragments": sum(len(own) for own in held),
        "most_bytes_sent_by_a_rank": max(map(len, reports)),
        "index_bytes": size,
        "layout_seconds": laid_out,
        "read_seconds": seconds,
    }
