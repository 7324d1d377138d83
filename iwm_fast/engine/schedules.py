"""Learning rate, weight decay and EMA momentum as pure functions of the step, so that a resumed run replays nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from iwm_fast.config import TrainConfig

__all__ = ["Schedules"]


def _cosine(first: float, last: float, progress: float) -> float:
    weight = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    value = first * weight + last * (1.0 - weight)  # exact at both ends; the next line clamps rounding
    return min(max(value, min(first, last)), max(first, last))


@dataclass(frozen=True)
class Schedules:
    """The three schedules of I-JEPA (src/utils/schedulers.py): ``step`` counts from 0, ``total`` is their length in
    steps. Only ``train.warmup`` is read: `config.batch.in_steps` converts warm-up in other units to steps.
    """

    train: TrainConfig
    total: int

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled with the global batch when ``train.lr_batch`` is set."""
        scale = self.train.global_batch / self.train.lr_batch if self.train.lr_batch else 1.0
        return self.train.lr * scale

    def lr(self, step: int) -> float:
        """Return the learning rate: linear warm-up from ``lr_start`` to 1, cosine to ``lr_final``, times the peak."""
        warmup = min(self.train.warmup, self.total)
        if step < warmup:
            return self.peak_lr * (self.train.lr_start + (1.0 - self.train.lr_start) * step / warmup)
        progress = (step - warmup) / max(1, self.total - warmup)
        return self.peak_lr * _cosine(1.0, self.train.lr_final, progress)

    def weight_decay(self, step: int) -> float:
        """Return the weight decay: a cosine over the whole training."""
        return _cosine(*self.train.weight_decay, step / max(1, self.total))

    def ema(self, step: int) -> float:
        """Return the momentum of the EMA target: a cosine over the whole training."""
        return _cosine(*self.train.ema, step / max(1, self.total))
