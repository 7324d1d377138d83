"""Run under torchrun by test_operations.py: a training whose second rank is slow, and whose first reads its own port.

A rank's own time comes from a clock that its forward passes advance: 100 s per pass, 300 s on the second rank.

Arguments: images, RUN, the Prometheus port.
"""

import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

from small_run import small_config

from iwm_fast.engine import pretrain, step, train
from iwm_fast.engine.distributed import stragglers
from iwm_fast.engine.distributed.ranks import leave

images, out, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
now = [0.0]


class Slow(step.Trainer):
    def _forward(self, batch):
        now[0] += 300.0 if self.ranks.rank == 1 else 100.0
        return super()._forward(batch)

    def train_step(self):
        record = super().train_step()
        if self.ranks.first and self.step == 5:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                out.with_name("scraped.txt").write_bytes(answer.read())
        return record


train.Trainer = Slow
stragglers.time = SimpleNamespace(perf_counter=lambda: now[0])
pretrain(small_config(images, train__steps=6, zero__stage=2, log__prometheus_port=port), out)
leave()
