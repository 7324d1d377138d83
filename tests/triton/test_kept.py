"""What the kernels save for the backward pass in a whole model: not the MLP's hidden."""

from pathlib import Path

import numpy as np
import pytest
from small_run import small_config

from iwm_fast.benchmarks.counting.kept_count import counted_activations
from iwm_fast.cost.activations import activations
from iwm_fast.cost.tokens import Tokens
from iwm_fast.kernels import use_backend


def test_a_forward_pass_saves_what_the_plan_says(device):
    if device != "cpu":
        pytest.skip("looks at the CPU's memory")
    config = small_config(Path("unused"))
    tokens = Tokens(np.array([7] * 16), np.array([5] * 16))
    with use_backend("triton"):
        kept = counted_activations(config, tokens)
    assert kept.total == pytest.approx(activations(config, tokens).kept, rel=5e-3)
