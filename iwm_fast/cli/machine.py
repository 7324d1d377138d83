"""Properties of the machine that break runs: GPU driver, shared memory, disks, open files, Triton's compiler."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Part", "examine_machine"]

_GIB = 2**30
# NCCL needs about this much of /dev/shm per rank of a host (NCCL_SHM, default buffers).
_SHM_A_RANK = 32 * 2**20
# Minimum of open files for a training on several ranks: readers, sockets, checkpoint shards.
_OPEN_FILES = 1024
# Minimum driver branch by CUDA version; 12.8 needs 570.
_DRIVER_FOR_CUDA = {13: 580, 12: 525}


@dataclass(frozen=True)
class Part:
    """One line of the doctor's diagnosis. broken: a run needs this part, and it does not work."""

    part: str
    version: str | None
    used: bool
    reason: str
    broken: bool = False


def examine_machine() -> Iterator[Part]:
    """Examine each property of the machine; nothing is changed."""
    import torch

    on_gpu = torch.cuda.is_available()
    yield _driver(on_gpu, torch.version.cuda)
    yield _compiler(on_gpu)
    yield _shared_memory(Path("/dev/shm"), torch.cuda.device_count() if on_gpu else 1, on_gpu)  # noqa: S108 - looked at
    yield _disk()
    yield _open_files()


def _driver(on_gpu: bool, cuda: str | None) -> Part:
    version = _driver_version()
    if on_gpu:
        needed = _DRIVER_FOR_CUDA.get(int((cuda or "0").split(".")[0]), 0)
        old = version is not None and int(version.split(".")[0]) < needed
        reason = f"CUDA {cuda} needs driver {needed} or later: update it" if old else f"serves CUDA {cuda}"
        return Part("driver", version, not old, reason, broken=old)
    hardware = any(Path("/dev").glob("nvidia[0-9]*"))
    if not hardware:
        return Part("driver", version, False, "no GPU on this machine (/dev/nvidia0 is missing)")
    if cuda is None:
        reason = "there is a GPU, and this torch is the CPU build: install one with CUDA, or train on the CPU"
        return Part("driver", version, False, reason, broken=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1", "NoDevFiles"):
        return Part("driver", version, False, f"CUDA_VISIBLE_DEVICES={visible} hides every GPU")
    reason = f"there is a GPU, and torch cannot use it: CUDA {cuda} and this driver do not match (see nvidia-smi)"
    return Part("driver", version, False, reason, broken=True)


def _driver_version() -> str | None:
    try:
        found = re.search(r"\b(\d{3}(?:\.\d+)+)\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def _compiler(on_gpu: bool) -> Part:
    """Triton builds a launcher for each new kernel, which needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or shutil.which(compiler) is None:
        reason = (
            "no C compiler (gcc, clang or CC), which Triton needs on a GPU and train.compile everywhere: install gcc"
        )
        return Part("compiler", None, False, reason, broken=on_gpu)
    if not header.is_file():
        reason = f"{header} is missing, which Triton's launchers include: install Python's headers (python3-dev)"
        return Part("compiler", Path(compiler).name, False, reason, broken=on_gpu)
    return Part("compiler", Path(compiler).name, on_gpu, "Triton's launchers" if on_gpu else "only for train.compile")


def _shared_memory(folder: Path, ranks: int, on_gpu: bool) -> Part:
    if not folder.is_dir():
        return Part("shared memory", None, False, f"{folder} is missing", broken=on_gpu and ranks > 1)
    free = shutil.disk_usage(folder).free
    needed = ranks * _SHM_A_RANK if on_gpu and ranks > 1 else 0
    short = free < needed
    reason = f"{_size(free)} free in {folder}"
    if short:
        reason += (
            f"; NCCL needs about {_size(needed)} for {ranks} ranks of this host: start the container with --shm-size"
        )
    return Part("shared memory", None, needed > 0, reason, broken=short)


def _disk() -> Part:
    places = {"the current folder": Path.cwd(), "TMPDIR": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    said = ", ".join(f"{_size(size)} free in {name}" for name, size in free.items())
    low = [name for name, size in free.items() if size < _GIB]
    if low:
        said += f"; under 1 GB in {low[0]}: checkpoints and compiled kernels may not fit"
    return Part("disk", None, True, said)


def _open_files() -> Part:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return Part("open files", None, True, f"{soft} at a time")
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    return Part("open files", None, True, f"{soft} at a time, few for several ranks: ulimit -n 4096 (at most {most})")


def _size(count: float) -> str:
    """Format bytes."""
    return f"{count / _GIB:.1f} GB" if count >= _GIB else f"{count / 2**20:.0f} MB"
