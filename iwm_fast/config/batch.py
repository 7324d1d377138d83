"""The arithmetic of a batch: how it is divided, and how many of them a training has."""

from __future__ import annotations

from iwm_fast.config import Config
from iwm_fast.errors import UserError

__all__ = ["divide_batch", "training_steps"]


def divide_batch(global_batch: int, world: int, ceiling: int | None) -> tuple[int, int]:
    """(micro-batch, accumulation): the largest divisor of a rank's share that is not above `ceiling`.

    UserError where `world` does not divide the global batch.
    """
    if global_batch % world:
        raise UserError(
            f"train.global_batch is {global_batch}, which {world} ranks cannot share evenly; "
            f"make it a multiple of {world}, or change the number of ranks"
        )
    share = global_batch // world
    micro = next(size for size in range(min(share, ceiling or share), 0, -1) if share % size == 0)
    return micro, share // micro


def training_steps(config: Config, images: int) -> int:
    """Length of the schedules in steps: ``train.schedule_steps``, or ``train.epochs`` passes over ``images``."""
    if config.train.schedule_steps is not None:
        return config.train.schedule_steps
    return max(1, round(config.train.epochs * images / config.train.global_batch))
