"""The environment of a result: versions, hardware and the commit, without names of hosts, users or paths.

Defaults count cores with `usable_cores`.
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
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name from Linux, else the machine's architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the cores that this process may use; a container or a batch job can have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or a repository that git does not trust
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with ``-modified`` where tracked files differ."""
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
    """Return JSON values: versions, platform, CPU, cores, GPUs, CUDA and the commit (None without a checkout)."""
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
