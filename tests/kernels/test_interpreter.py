"""Runs tests/triton in Triton's interpreter, in a process of its own: it cannot share one with the compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_kernels_pass_their_tests_in_the_interpreter():
    # One thread: the interpreter works in Python and NumPy, and OpenMP's threads would only wait for it.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed.group(1)) > 100
    assert "skipped" not in done.stdout.splitlines()[-1].replace("1 skipped", "")  # inductor needs a C++ compiler
