"""Everything in this folder needs a GPU and is skipped without one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")
