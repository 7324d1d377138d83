"""Run a program of iwm-fast on the null GPU with the checks of its answers passed: nothing is computed, none is right.

    python -m tools.nullgpu.within MODULE [ARGUMENT ...]

Programs that it starts go the same way: ``sys.executable`` is the wrapper that `place` writes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from tools.nullgpu.place import FOLDER

# Where benchmarks compare answers: module, function, what it says here.
_PASSED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("iwm_fast.benchmarks.step", "check_answer", lambda *_: float("nan")),
    ("iwm_fast.benchmarks.kernels", "errors", lambda *_: {"out": 0.0}),
    ("iwm_fast.benchmarks.attention", "_relative", lambda *_: 0.0),
    ("iwm_fast.benchmarks.setting_gain", "loss_difference", lambda *_: 0.0),
    ("iwm_fast.benchmarks.ceilings", "require_sums", lambda *_: None),
    # On the CPU, and right, but half a minute of a part that has two.
    ("iwm_fast.benchmarks.adapters.answers", "plain_difference", lambda *_: 0.0),
    ("iwm_fast.benchmarks.adapters.answers", "timm_difference", lambda *_: 0.0),
    ("iwm_fast.benchmarks.adapters.answers", "ijepa_difference", lambda *_: 0.0),
)


def main(words: list[str]) -> int:
    """Import the module, pass its checks, and call its ``main``; its exit code."""
    name = words[0]
    torch.backends.cudnn.enabled = False  # it plans a convolution by what the device answers
    sys.executable = str(FOLDER / "python")
    for module, function, said in _PASSED:
        loaded = importlib.import_module(module)
        if not callable(getattr(loaded, function)):
            raise TypeError(f"{module}.{function} is no function any more")
        setattr(loaded, function, said)
    # Nor is a gradient finite, and a run ends where too many in a row are not.
    skipped = importlib.import_module("iwm_fast.engine.nonfinite").SkippedSteps
    if not callable(skipped._add):  # noqa: SLF001
        raise TypeError("SkippedSteps._add is no function any more")
    skipped._add = lambda *_: None  # noqa: SLF001
    program = importlib.import_module("iwm_fast.cli.main" if name == "iwm_fast" else name)
    sys.argv = [name, *words[1:]]
    code = program.main()
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the libraries' own destructors wait for a device that is not there
