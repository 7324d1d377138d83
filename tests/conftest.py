"""What every test shares: the settings of libraries before they are imported, and a few small images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from iwm_fast.log_filters import quiet_third_parties

os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_third_parties()
# A first example pays for imports, and CI must say the same of the same commit each time.
settings.register_profile("iwm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("iwm")


# Minutes of one core: begun with the first test and waited for by the last, it takes the second one.
_IN_INTERPRETER = "test_the_kernels_pass_their_tests_in_the_interpreter"
_interpreter: list[subprocess.Popen[str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what has been begun beforehand last."""
    items.sort(key=lambda item: item.name == _IN_INTERPRETER)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the kernels' tests, in a process of their own: the interpreter cannot share one with the compiler."""
    if session.config.option.collectonly or all(item.name != _IN_INTERPRETER for item in session.items):
        return
    # One thread: the interpreter works in Python and NumPy, and OpenMP's threads would only wait for it.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "tests/triton"]
    _interpreter.append(
        subprocess.Popen(
            command,
            cwd=session.config.rootpath,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    )


def pytest_sessionfinish() -> None:
    """Nothing outlives a session that was broken off."""
    for process in _interpreter:
        process.kill()


@pytest.fixture
def kernels_in_interpreter() -> tuple[int, str]:
    """Exit code and output of tests/triton under TRITON_INTERPRET=1."""
    said, _ = _interpreter[0].communicate()
    return _interpreter[0].returncode, said


@pytest.fixture
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's linear layer in its place, where an engine of stage 3 has left DeepSpeed's own."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture
def regions_as_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled regions are the graphs of both passes with their guards, run as they are: inductor takes a minute more,
    and tests/engine/test_compiled.py trains with it.
    """
    from iwm_fast.models import compiled_regions

    compiled_regions._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    compiled_regions._compiled.cache_clear()


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of twelve JPEGs each: gradients of two colours with noise, sides of 40 to 63 pixels."""
    root = tmp_path_factory.mktemp("tiny_images")
    random = np.random.default_rng(0)
    for label, colour in (("cold", (40, 90, 220)), ("warm", (230, 120, 30))):
        folder = root / label
        folder.mkdir()
        for i in range(12):
            height, width = random.integers(40, 64, size=2)
            ramp = np.linspace(0.3, 1.0, width)[None, :, None]
            levels = np.asarray(colour) * ramp + random.normal(0, 12, (height, width, 3))
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=95)
    return root
