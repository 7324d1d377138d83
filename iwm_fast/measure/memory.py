"""Peak memory of a function in this process: allocated on a GPU, resident on a CPU (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["peak_of", "resident_bytes"]

_RESET_PEAK = "5"  # of the resident set, proc(5)


def resident_bytes(*, peak: bool = False) -> int:
    """Return the process's resident set, or its peak since the last reset."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of `work`, in bytes above what was allocated before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Return freed memory to the system first, or this work would reuse it and seem to need none.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before = resident_bytes()
    work()
    return resident_bytes(peak=True) - before
