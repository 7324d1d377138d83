"""Where the null GPU's environment, libraries and caches lie, and how a program is started on it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FOLDER", "PYTHON", "ROOT", "null_environment", "packages", "run"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("NULLGPU", Path(tempfile.gettempdir()) / "nullgpu")).absolute()
PYTHON = Path(os.environ.get("NULLGPU_PYTHON", FOLDER / "venv/bin/python"))


def packages() -> Path:
    """The site-packages folder of the environment with PyTorch's CUDA build. FileNotFoundError where there is none."""
    found = next(PYTHON.parents[1].glob("lib/python3*/site-packages"), None)
    if found is None:
        raise FileNotFoundError(f"{PYTHON}: no such environment; make it by: python -m tools.nullgpu setup")
    return found


# What a CPU's tests and programs set for themselves would hide the null GPU, or run its kernels in the interpreter.
_LEFT_OUT = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TRITON_INTERPRET")


def null_environment() -> dict[str, str]:
    """The environment variables under which a process of ``PYTHON`` sees the null GPU."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {name: value for name, value in os.environ.items() if name not in _LEFT_OUT} | {
        "NULLGPU": str(FOLDER),
        "LD_PRELOAD": f"{FOLDER}/libnullrt.so:{FOLDER}/libcuda.so.1",
        "LD_LIBRARY_PATH": f"{FOLDER}:{packages() / 'nvidia/cu13/lib'}",
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        # Nothing that was compiled or tuned without a GPU may be found by a run with one.
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        "IWM_FAST_TUNING_DIR": str(FOLDER / "tuning"),
    }


# Takes the place of the interpreter that programs start programs with: those of iwm-fast go through `within`.
_WRAPPER = """#!/bin/sh
if [ "$1" = -m ]; then
    case "$2" in
    iwm_fast | iwm_fast.benchmarks.* | benchmarks.*)
        module=$2
        shift 2
        case "$module" in benchmarks.*) module=iwm_fast.$module ;; esac
        exec {python} -m tools.nullgpu.within "$module" "$@"
        ;;
    esac
fi
exec {python} "$@"
"""


def run(words: Sequence[str]) -> int:
    """Run the environment's Python with ``words`` on the null GPU, in the current folder; its exit code."""
    wrapper = FOLDER / "python"
    wrapper.write_text(_WRAPPER.format(python=PYTHON))
    wrapper.chmod(0o755)
    return subprocess.run([str(wrapper), *words], env=null_environment(), check=False).returncode
