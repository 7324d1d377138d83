"""Choose DALI's device and threads."""

from __future__ import annotations

import os

import torch

from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError

__all__ = ["dali_device", "dali_threads", "image_checkers", "use_gpu"]

# A process checks 10,000 JPEGs of 100 KB per second; ViT-Ti/16 on an H200 takes no more than some thousand.
_MOST_CHECKERS = 2


def dali_device(wanted: str) -> str:
    """Return data.device on this machine, "cpu" or "gpu". Raises UserError where a GPU is requested and there
    is none.
    """
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("data.device is gpu, but torch sees no GPU here; set data.device=cpu or auto")
    return ("gpu" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def dali_threads(wanted: int | None, world: int = 1) -> int:
    """Return DALI's threads: data.threads, or the cores of this process over the ranks of this host."""
    if wanted is not None:
        return wanted
    said = os.environ.get("LOCAL_WORLD_SIZE", "")  # of an old shell, perhaps: a rank alone has all cores
    ranks = min(world, int(said)) if said.isdigit() else world
    return max(1, usable_cores() // max(1, ranks))


def image_checkers(wanted: int | None, device: str, world: int = 1) -> int:
    """Return the processes per rank that check images: data.checkers, or on a GPU an eighth of the rank's cores, at
    most 2.

    On a CPU none: the cores decode and train.
    """
    if wanted is not None:
        return wanted
    return min(_MOST_CHECKERS, dali_threads(None, world) // 8) if device == "gpu" else 0


def use_gpu(device_id: int | None) -> None:
    """Make a GPU the calling thread's current one; None: there is none.

    CUDA's current device is per thread, and a new thread has the first: pinned memory, streams and kernels there would
    give every rank of a host a context on GPU 0.
    """
    if device_id is not None:
        torch.cuda.set_device(device_id)
