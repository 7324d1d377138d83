"""Connections of a rank's gloo groups, counted in processes."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # dozens of processes

PROGRAM = """
import json, sys
from iwm_fast.benchmarks.simulated_ranks.sockets import sockets_of
print(json.dumps(sockets_of(int(sys.argv[1]))))
"""


@pytest.mark.parametrize("world", [4, 16, 32])
def test_a_rank_connects_to_its_neighbours_and_the_first_whatever_the_number_of_ranks(world):
    command = [sys.executable, "-c", PROGRAM, str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == world
    for counts in found[1:]:
        # Per group a listening socket and two neighbours, the first rank for a checkpoint's reports, and two to the
        # launcher's store.
        assert counts["gloo"] <= 7
        assert sum(counts.values()) <= 12
