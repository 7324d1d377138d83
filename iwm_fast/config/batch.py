"""How long a training is."""

from __future__ import annotations

from iwm_fast.config import Config

__all__ = ["training_steps"]


def training_steps(config: Config, images: int) -> int:
    """Length of the schedules in steps: ``train.schedule_steps``, or ``train.epochs`` passes over ``images``."""
    if config.train.schedule_steps is not None:
        return config.train.schedule_steps
    return max(1, round(config.train.epochs * images / config.train.global_batch))
