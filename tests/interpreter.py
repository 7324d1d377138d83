"""Run tests/triton in Triton's interpreter: minutes of one core, in processes of their own.

The interpreter and the compiler cannot share a process. The files run in parts, so that several cores may share them.
Under pytest-xdist each part is a test like others, and starts first. In a single process all parts start with the first
test, run in sequence in the background, and the last tests wait for them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

__all__ = ["PARTS", "Beside"]

FOLDER = Path(__file__).parent / "triton"
# About equally long, the longest first. Files named in none belong to the last.
_NAMED = {
    "the MLP": ("test_mlp.py", "test_sums.py"),
    "operators": ("test_operators.py", "test_loss.py", "test_zero.py"),
}
_OTHERS = {path.name for path in FOLDER.glob("test_*.py")} - {name for names in _NAMED.values() for name in names}
PARTS = _NAMED | {"the others": tuple(sorted(_OTHERS))}


class Beside:
    """Runs parts in sequence in a thread, while the caller does something else."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[str, Future[None]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._starting = threading.Lock()

    def begin(self, parts: list[str]) -> None:
        """Start the parts that have not started."""
        for part in parts:
            if part not in self._begun:
                self._begun[part] = self._thread.submit(self._run, part)

    def wait(self, part: str) -> None:
        """Raise AssertionError with the output if a test of the part failed or none ran."""
        self.begin([part])
        self._begun[part].result()

    def end(self) -> None:
        """Stop what an interrupted session started."""
        with self._starting:
            self._ended = True
            if self._process is not None:
                self._process.kill()
        self._thread.shutdown(cancel_futures=True)

    def _run(self, part: str) -> None:
        # One thread: the interpreter works in Python and NumPy, and OpenMP's threads would only wait for it.
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        # A process of its own, not one of the workers.
        environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_XDIST_")}
        files = [str(FOLDER / name) for name in PARTS[part]]
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._starting:
            if self._ended:
                return
            self._process = subprocess.Popen(command, cwd=FOLDER.parents[1], env=environment, text=True, **pipes)
        said, _ = self._process.communicate()
        assert self._process.returncode == 0, said[-6000:]
        last = said.splitlines()[-1]
        passed = re.search(r"(\d+) passed", last)
        assert passed, said[-6000:]
        assert int(passed.group(1)) > 20, last
        assert "skipped" not in last.replace("1 skipped", ""), last  # inductor needs a C++ compiler
