"""What a result was made with: versions, hardware and the commit. Nothing here names a host, a user or a path.

The cores are those that defaults are counted from.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from iwm_fast.version import __version__

__all__ = ["PACKAGES", "cpu_name", "environment", "installed_version", "usable_cores"]

PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "pillow",
    "pydantic",
    "safetensors",
)


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the machine's architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which in a container or a batch job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a repository that it is willing to read
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the checkout this package runs from, ``-modified`` added when tracked files differ from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-modified" if commit and changed else commit


@functools.cache
def _gpus() -> tuple[dict[str, Any], ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple({"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in found)


def environment() -> dict[str, Any]:
    """JSON values: versions, platform, CPU, cores, GPUs, CUDA and the commit (None where there is none)."""
    import torch

    return {
        "iwm_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "gpus": list(_gpus()),
        "cuda": torch.version.cuda,
        "packages": {name: installed_version(name) for name in PACKAGES},
    }
