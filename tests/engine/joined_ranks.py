"""Run by test_links.py, one process a rank: the check of the interconnect alone, between ranks that misbehave.

Argument: what the last rank does, "well", "slow" (its messages wait before they are sent), "hang" (its first one does
not come). The first rank prints what was measured and what it warns of, as JSON.
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


def misbehave(how):
    def send(operations):
        if operations[0].op is dist.isend:
            time.sleep(0.5 if how == "slow" else 600)
        return plain(operations)

    dist.batch_isend_irecv = send


ranks = start(60.0)
if ranks.rank == ranks.world - 1 and sys.argv[1] != "well":
    misbehave(sys.argv[1])
live = Liveness(ranks, 60.0)
with live.watching():
    found = links.measure_interconnect(ranks, live, SILENT_S)
    if ranks.first:
        said = links.far_below(found.links, ranks.peers)
        print(json.dumps({"measured": found.document(), "said": said}), flush=True)
if sys.argv[1] != "hang":
    leave()
    if dist.is_initialized():
        sys.exit("the process group is still there")
