"""What a rank sets up before it trains."""

import os
import subprocess
import sys

import pytest

GROWN = """
import os
import torch
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.measure.memory import resident_bytes

def multiply(first, count):
    for rows in range(first, first + count):
        torch.nn.functional.linear(torch.ones(rows, 192).bfloat16(), weight).sum().backward()

start(alone=True)
weight = torch.ones(192, 192).bfloat16().requires_grad_()
multiply(1000, 40)
before = resident_bytes()
multiply(2000, 300)
print(resident_bytes() - before, os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.parametrize("own", [None, "7"], ids=["default", "set by the user"])
def test_batches_of_ever_new_shapes_do_not_fill_the_memory(own):
    """300 numbers of tokens. With the libraries' own limit, 1,024 shapes, a CPU with bf16 matmuls keeps 431 MB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.pop(name, None)
        environment |= {} if own is None else {name: own}
    done = subprocess.run([sys.executable, "-c", GROWN], env=environment, capture_output=True, text=True, check=True)
    grown, capacity = done.stdout.split()[-2:]
    assert int(grown) < 150e6
    assert capacity == (own or "64")
