"""Run by test_links.py, one process per rank: the check of the interconnect alone, with ranks that misbehave.

Argument: the last rank's behaviour, "well", "slow" (its messages take long, by a clock that messages advance), "hang"
(its first one never comes). Rank 0 prints the measurements and warnings as JSON.
"""

import json
import sys
import time

import torch.distributed as dist

from iwm_fast.engine.distributed import links
from iwm_fast.engine.distributed.ranks import leave, start
from iwm_fast.engine.distributed.watchdog import Liveness

SILENT_S = 4.0
plain = dist.batch_isend_irecv


def hang(operations):
    if operations[0].op is dist.isend:
        time.sleep(600)
    return plain(operations)


class Clock:
    """Advanced by half a second or five milliseconds per received message, and a little by each reading."""

    def __init__(self, slow):
        self.now, self.slow = 0.0, slow

    def perf_counter(self):
        self.now += 1e-9
        return self.now

    def transfer(self, operations):
        if operations[0].op is dist.irecv:
            self.now += 0.5 if operations[0].peer == self.slow else 0.005
        return plain(operations)


ranks = start(60.0)
if sys.argv[1] == "slow":
    links.time = clock = Clock(ranks.world - 1)
    dist.batch_isend_irecv = clock.transfer
elif sys.argv[1] == "hang" and ranks.rank == ranks.world - 1:
    dist.batch_isend_irecv = hang
live = Liveness(ranks, 60.0)
with live.watching():
    found = links.measure_interconnect(ranks, live, SILENT_S)
    if ranks.first:
        said = links.far_below(found.links, ranks.infos)
        print(json.dumps({"measured": found.document(), "said": said}), flush=True)
if sys.argv[1] != "hang":
    leave()
    if dist.is_initialized():
        sys.exit("the process group is still there")
