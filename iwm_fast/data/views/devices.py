"""Where DALI runs, and on how many threads."""

from __future__ import annotations

import os

import torch

from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError

__all__ = ["dali_device", "dali_threads", "image_checkers", "use_gpu"]

# A process checks 10,000 JPEGs of 100 KB per second of its own; ViT-Ti/16 on an H200 takes no more than some thousand.
_MOST_CHECKERS = 2


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


def image_checkers(wanted: int | None, device: str, world: int = 1) -> int:
    """Processes of a rank that check images: data.checkers, or on a GPU an eighth of the rank's cores, 2 at most.

    On a CPU none: there the cores that they would take are those that decode and train.
    """
    if wanted is not None:
        return wanted
    return min(_MOST_CHECKERS, dali_threads(None, world) // 8) if device == "gpu" else 0


def use_gpu(device_id: int | None) -> None:
    """Make a GPU the calling thread's own; None: there is none.

    CUDA's current device is each thread's, and a new thread's is the first: pinned memory, streams and kernels there
    would make every rank of a host a context on GPU 0.
    """
    if device_id is not None:
        torch.cuda.set_device(device_id)
