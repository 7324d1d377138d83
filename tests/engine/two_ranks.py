"""Run under torchrun by test_ranks.py: several trainings one after the other on the same ranks, which saves the
imports.

Arguments: images, out, then one JSON object of changes to the small configuration, with its run's name, for each
training.
"""

import json
import sys
from pathlib import Path

from small_run import small_config

from iwm_fast.engine import pretrain

images, out, *jobs = sys.argv[1:]
for job in jobs:
    changes = json.loads(job)
    name, resume = changes.pop("name"), changes.pop("resume", "never")
    pretrain(small_config(Path(images), **changes), Path(out) / name, resume)
