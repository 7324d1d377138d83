"""Tests of the Triton kernels: on a GPU if there is one, else in Triton's interpreter, in a process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/triton

`tests/kernels/test_interpreter.py` runs this, because the interpreter and the compiler cannot share a process.
"""

import pytest
import torch

from iwm_fast.kernels._lib.jit import INTERPRETED


def pytest_collection_modifyitems(items):
    if INTERPRETED.value or torch.cuda.is_available():
        return
    reason = "needs TRITON_INTERPRET=1 or a GPU: tests/kernels/test_interpreter.py runs it in a process of its own"
    for item in items:
        if "tests/triton" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device():
    return "cpu" if INTERPRETED.value else "cuda"
