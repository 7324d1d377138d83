"""Start some_ranks.py on several ranks of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "engine" / "some_ranks.py"


def on_ranks(world, images, out, jobs, **variables):
    """Run the jobs in sequence under torchrun; raise AssertionError with the output if that fails.

    variables: of the environment.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    command += [str(SCRIPT), str(images), str(out), *map(json.dumps, jobs)]
    environment = (
        os.environ
        | variables
        | {
            "PYTHONPATH": f"{SCRIPT.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
        }
    )
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
