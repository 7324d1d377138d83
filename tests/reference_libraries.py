"""timm and transformers in a process of their own, so that neither they nor torchvision enter the tests' process.

`reference_models` builds every reference in one such process, because importing both takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["TORCHVISION", "build_references", "import_torchvision", "require_libraries", "run_program"]

HERE = Path(__file__).resolve().parent
# The first lines of a program that imports timm or transformers.
TORCHVISION = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(HERE)!r})
from reference_libraries import import_torchvision

import_torchvision()
import torch
"""


def import_torchvision() -> None:
    """Import torchvision beside a CPU build of torch, where PyPI's wheel cannot load its detection operators.

    It then refuses to be imported. Declaring their names makes its transforms available; a vision transformer calls
    none of the operators.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        found = importlib.util.find_spec("torchvision")
        assert found is not None
        assert found.submodule_search_locations
        text = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
        for name in set(re.findall(r'register_meta\("(\w+)"\)|torchvision::(\w+)', text)):
            torch.library.define(f"torchvision::{name[0] or name[1]}", "(Tensor x) -> Tensor")


def require_libraries(*names: str) -> None:
    """Skip the test where a library is not installed."""
    missing = [name for name in (*names, "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (extra test)")


def run_program(path: Path, *words: object, cwd: Path | None = None) -> str:
    """Run a program without network; return its output, or raise AssertionError with its errors."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(path), *map(str, words)],
        capture_output=True, text=True, timeout=600, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def build_references(out: Path, *names: str) -> Path:
    """Build the references of `reference_models` into ``out``, those of these names, or all small ones; return it."""
    require_libraries("timm", "transformers")
    run_program(HERE / "reference_models.py", out, *names)
    return out
