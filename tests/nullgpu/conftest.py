"""The CUDA path on a machine without a GPU (tools/nullgpu). Enable with IWM_TEST_NULLGPU=1; needs 5 GB."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session", autouse=True)
def null_gpu() -> None:
    """Stubs, built from the working tree."""
    if os.environ.get("IWM_TEST_NULLGPU") != "1":
        pytest.skip("takes minutes and 5 GB of CUDA libraries: set IWM_TEST_NULLGPU=1")
    from tools.nullgpu.build import build
    from tools.nullgpu.place import PYTHON

    if not PYTHON.exists() or shutil.which("gcc") is None:
        pytest.fail(f"{PYTHON} or gcc is missing: python -m tools.nullgpu setup, and install gcc")
    build()
