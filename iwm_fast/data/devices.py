"""Where DALI runs, and on how many threads."""

from __future__ import annotations

import os

import torch

from iwm_fast.config.cores import usable_cores
from iwm_fast.errors import UserError

__all__ = ["dali_device", "dali_threads", "use_gpu"]


def dali_device(wanted: str) -> str:
    """What data.device means here, "cpu" or "gpu"; UserError where a GPU is asked for and there is none."""
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("data.device is gpu, but torch sees no GPU here; set data.device=cpu or auto")
    return ("gpu" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def dali_threads(wanted: int | None, world: int = 1) -> int:
    """Threads for DALI: data.threads, or the cores this process may use over the ranks of this host."""
    if wanted is not None:
        return wanted
    said = os.environ.get("LOCAL_WORLD_SIZE", "")  # of an old shell, perhaps: a rank alone has all cores
    ranks = min(world, int(said)) if said.isdigit() else world
    return max(1, usable_cores() // max(1, ranks))


def use_gpu(device_id: int | None) -> None:
    """Make a GPU the calling thread's own; None: there is none.

    CUDA's current device is each thread's, and a new thread's is the first: pinned memory, streams and kernels there
    would make every rank of a host a context on GPU 0.
    """
    if device_id is not None:
        torch.cuda.set_device(device_id)
