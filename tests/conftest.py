"""Shared by all tests: settings of libraries before they are imported, and a few small images."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from interpreter import Beside
from PIL import Image
from reference_libraries import build_references

from iwm_fast.log_filters import quiet_third_parties

os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_third_parties()
# A shell makes its background jobs ignore Ctrl-C, and their children inherit that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The first example includes imports, and CI must give the same result for the same commit.
settings.register_profile("iwm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("iwm")


_beside = Beside()
_IN_INTERPRETER = "tests/kernels/test_interpreter.py::"
# Under pytest-xdist these files start first, in this order: a long one that starts last leaves other workers idle. Any
# order is correct, and a missing file only loses seconds.
_BEGUN_FIRST = (
    "tests/kernels/test_interpreter.py",
    "tests/faults/test_ranks_lost.py",
    "tests/cost/test_counted.py",
    "tests/data/test_s3.py",
    "tests/cli/test_main.py",
    "tests/engine/test_faults.py",
    "tests/data/test_survival.py",
    "tests/test_api.py",
    "tests/test_without_dali.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Set one thread per worker, and per process that a test starts: workers share the cores already."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """-n auto: one worker per usable core, at most eight; the longest file bounds the gain of more."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep files whole, so that module fixtures run once; the interpreter's parts are split."""
    if config.getoption("dist") != "load":  # the user chose another
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(_IN_INTERPRETER) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # as collected, not the files of most tests first
    return Files(config, log)


def _of_a_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist long tests come first; in a single process those that run in the background come last."""
    if not _of_a_worker(config):
        items.sort(key=lambda item: item.nodeid.startswith(_IN_INTERPRETER))
        return
    places = {file: place for place, file in enumerate(_BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """In a single process, start the kernels' tests in the background."""
    if session.config.option.collectonly or _of_a_worker(session.config):
        return
    parts = [item.callspec.params["part"] for item in session.items if item.nodeid.startswith(_IN_INTERPRETER)]
    _beside.begin(parts)


def pytest_sessionfinish() -> None:
    """Stop everything that an interrupted session started."""
    _beside.end()


@pytest.fixture
def in_interpreter() -> Callable[[str], None]:
    """Run a part of tests/triton under TRITON_INTERPRET=1, or wait for it if it was started."""
    return _beside.wait


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """Return tests/plain_networks.py, which imports the models: only tests of models and exports need it."""
    import plain_networks

    return plain_networks


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line with these words in this process: a new one would import for seconds."""
    from iwm_fast.cli.main import main

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


@pytest.fixture
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore torch's linear layer after an engine of stage 3 replaced it by DeepSpeed's."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture
def regions_as_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run compiled regions as the traced graphs of both passes with their guards: inductor takes a minute more, and
    tests/engine/test_compiled.py trains with it.
    """
    from iwm_fast.models import compiled_regions

    compiled_regions._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    compiled_regions._compiled.cache_clear()


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of two classes of twelve JPEGs each: noisy gradients of two colours, sides of 40 to 63 pixels."""
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


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build small models of timm and transformers with their features, as tests/reference_models.py says."""
    return build_references(tmp_path_factory.mktemp("references"))
