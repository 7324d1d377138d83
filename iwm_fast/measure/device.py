"""The device of a measurement."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError

if TYPE_CHECKING:
    from iwm_fast.engine.distributed.ranks import Ranks

__all__ = ["only_rank"]


def only_rank(device: str | None, threads: int | None) -> Ranks:
    """Join as the only rank, on cpu, cuda, or by default on a GPU if there is one. ``threads``: of torch, on a CPU.

    Raises UserError if there is no such device.
    """
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: {device}: must be cpu or cuda")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    import torch

    from iwm_fast.engine.distributed.ranks import leave, start

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda: torch sees no GPU; run iwm-fast doctor")
    torch.set_num_threads(threads or usable_cores())
    atexit.register(leave)
    return start(alone=True)
