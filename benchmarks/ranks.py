"""One rank of `bench scaling`, started by torchrun: time the step and count the communication.

Run ``torchrun --nproc_per_node 2 -m iwm_fast.benchmarks.ranks CONFIG.json OUT.json REPEATS``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.cost.communication import step_collectives
from iwm_fast.cost.memory import layout_of
from iwm_fast.engine.distributed.ranks import leave, start
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.measure.collective_bytes import CollectiveCounter
from iwm_fast.measure.collective_time import timed_collectives
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.measure.timing import clocked
from iwm_fast.programs import run_program

__all__ = ["main"]

_WARM_UP = 2


def main(config_file: Path, out: Path, repeats: int) -> None:
    """Run; rank 0 writes the row."""
    quiet_third_parties()
    torch.set_num_threads(1)
    config = Config.model_validate(json.loads(config_file.read_text()))
    ranks, space = start(), space_of(config.actions)
    with timed_collectives() as spent:
        stream = synthetic_stream(config, space, ranks.device, rank=ranks.rank, world=ranks.world)
        trainer = prepare_trainer(config, space, stream, ranks)
        for _ in range(_WARM_UP):
            trainer.train_step()
        with CollectiveCounter() as counter:
            trainer.train_step()
        spent.seconds = 0.0
        taken = [clocked(trainer.train_step, ranks.device) for _ in range(repeats)]
    expected: dict[str, int] = {}
    expected_within = 0
    for one in step_collectives(config, layout_of(config), ranks.world, stream.accumulation):
        expected[one.kind] = expected.get(one.kind, 0) + one.size
        expected_within += one.size if one.ranks else 0
    host = config.zero.hpz_partition_size
    within = sum(call.size for call in counter.calls if 1 < host == call.ranks < ranks.world)
    row: dict[str, Any] = {
        "ranks": ranks.world,
        "images": config.train.global_batch,
        "sources_per_target": config.views.sources_per_target,
        "zero_stage": config.zero.stage,
        "hpz_partition_size": config.zero.hpz_partition_size,
        "seconds": [one.seconds for one in taken],
        "cpu_seconds": [one.cpu_seconds for one in taken],
        "collectives_a_step": {
            "payload_bytes": counter.sizes() if ranks.world > 1 else {},
            "sent_bytes_ring": counter.sent(),
            "within_host_bytes": within,
            "seconds": spent.seconds / repeats,
        },
        "expected_bytes": expected,
        "expected_within_host_bytes": expected_within,
    }
    if ranks.first:
        out.write_text(json.dumps(row))
    leave()


if __name__ == "__main__":
    name, config, out, repeats = sys.argv
    sys.exit(run_program("benchmarks.ranks", partial(main, Path(config), Path(out), int(repeats))))
