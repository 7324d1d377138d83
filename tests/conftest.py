"""What every test shares: the settings of libraries before they are imported, and a few small images."""

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

from iwm_fast.log_filters import quiet_third_parties

os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_third_parties()
# A shell has its background jobs ignore Ctrl-C, which they pass on to what they start: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A first example pays for imports, and CI must say the same of the same commit each time.
settings.register_profile("iwm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("iwm")


_beside = Beside()
_IN_INTERPRETER = "tests/kernels/test_interpreter.py::"
# Under pytest-xdist files are taken up in this order, the others after these: a long one begun last leaves the other
# workers idle. No order is wrong, and a file that is not named here loses seconds.
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
    """One thread a worker, and a process of its own where a test starts one: workers share the cores already."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """-n auto: as many as the process may use cores. The longest file bounds what more than eight could gain."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Files stay whole, so that what a module's fixture makes is made once; the interpreter's parts are apart."""
    if config.getoption("dist") != "load":  # another was asked for
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
    """Under pytest-xdist what is long comes first; in a single process what has been begun beforehand comes last."""
    if not _of_a_worker(config):
        items.sort(key=lambda item: item.nodeid.startswith(_IN_INTERPRETER))
        return
    places = {file: place for place, file in enumerate(_BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the kernels' tests beside those of this process, where no other worker could take them."""
    if session.config.option.collectonly or _of_a_worker(session.config):
        return
    parts = [item.callspec.params["part"] for item in session.items if item.nodeid.startswith(_IN_INTERPRETER)]
    _beside.begin(parts)


def pytest_sessionfinish() -> None:
    """Nothing outlives a session that was broken off."""
    _beside.end()


@pytest.fixture
def in_interpreter() -> Callable[[str], None]:
    """Run a part of tests/triton under TRITON_INTERPRET=1, or wait for it where it has been begun."""
    return _beside.wait


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """tests/plain_networks.py, which imports the models: only the tests of them and of their exports wait for it."""
    import plain_networks

    return plain_networks


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line with these words, called in this process: a fresh one would import for seconds."""
    from iwm_fast.cli.main import main

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


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
