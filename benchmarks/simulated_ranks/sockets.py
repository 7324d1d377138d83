"""Count the sockets that each of many processes opens for what all ranks of a training do together.

The processes are forked from one that has imported torch, so that 64 fit on a small machine. As on GPUs, the control
messages and the checkpoint's threads have gloo groups of their own; gloo stands for NCCL in the default group, whose
connections are counted apart.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.engine.checkpoint.format import Fragment
from iwm_fast.engine.checkpoint.writer import CheckpointWriter
from iwm_fast.engine.distributed.links import measure_interconnect
from iwm_fast.engine.distributed.ranks import agree, decide, gather, leave, start
from iwm_fast.engine.distributed.stragglers import over_ranks
from iwm_fast.engine.distributed.watchdog import Liveness

__all__ = ["sockets_of"]

_LIMIT_S = 300.0


def sockets_of(world: int) -> list[dict[str, int]]:
    """Return by rank {start, default, gloo}: sockets after the start (the launcher's store, and the default group's
    neighbours), more of the default group, and of both gloo groups.

    Raises RuntimeError where a process fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, world, port, Path(folder))) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(_LIMIT_S)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            process.kill()
        if failed:
            raise RuntimeError(f"ranks {failed} of {world} failed")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, world: int, port: str, folder: Path) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.set_num_threads(1)
    before = _sockets()
    ranks = start(60.0)
    live = Liveness(ranks, 60.0)
    stored = _sockets() - before
    measure_interconnect(ranks, live, 60.0)
    default = _sockets() - before - stored
    ranks = replace(ranks, control=dist.new_group(backend="gloo"))
    found: dict[str, Any] = {"start": stored, "default": default}
    decide(ranks, lambda: folder)
    agree(ranks, False, True)
    over_ranks({"own_s": 0.1, "loss": 1.0}, ranks)
    gather(rank, world, ranks.control)
    writer = CheckpointWriter(folder, ranks, 1, None)
    for step in (1, 2):
        parts = [Fragment("weight", "a", (4 * world,), 4 * rank, torch.ones(4))]
        writer.save(step, parts, {"updates": step}, {"weight/a": [4 * world]})
    writer.wait()
    writer.close()
    found["gloo"] = _sockets() - before - stored - default
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave()


def _sockets() -> int:
    count = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            count += name.readlink().name.startswith("socket:")
        except OSError:  # the listing's own
            continue
    return count
