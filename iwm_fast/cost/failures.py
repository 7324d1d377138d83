"""Failures of a run: how many to expect, how often to write checkpoints, and the time that both take.

A job of W GPUs, each of which interrupts it once per `gpu_hours` on average, runs M = gpu_hours / W between failures,
which are exponential and independent. The training waits δ for a checkpoint, whose writing then takes L beside the
training (`engine.checkpoint.writer`): a failure falls back to the newest one that is whole on the disk. It restarts in
R, in which it may fail again.

The interval between checkpoints with the least expected time is about √(2δM) (Young 1974, doi:10.1145/361147.361115),
or to a higher order √(2δM) · [1 + ⅓ √(δ/2M) + δ/18M] − δ where δ < 2M, else M (Daly 2006,
doi:10.1016/j.future.2004.11.016). L does not move the optimum to first order, because it adds the same to each failure.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "GPU_HOURS", "GPU_HOURS_SOURCE", "RESTART_S", "STORAGE", "Checkpoint", "Failures", "Interval", "Loss", "daly",
    "expected_loss", "expected_seconds", "young",
]  # fmt: skip

# 419 unexpected interruptions in 54 days on 16,384 GPUs, of GPUs, hosts, network and software together: 50,677 hours.
GPU_HOURS = 54 * 24 * 16384 / 419
GPU_HOURS_SOURCE = "Llama 3, arXiv:2407.21783, table 5: 419 unexpected interruptions of 16,384 H100 in 54 days"
STORAGE = 5e9  # assumed: bytes/s that a job writes to the hosts' shared storage
RESTART_S = 300.0  # assumed: until a job is launched again, has imported its libraries and makes steps
# Assumed: bytes/s from a GPU to its host's pinned memory over PCIe, and the seconds in which the device runs dry and
# the ranks agree.
HOST_COPY, DRAIN_S = 20e9, 0.1


@dataclass(frozen=True)
class Failures:
    """gpu_hours: between two failures of one GPU. storage: bytes/s of all hosts together. restart_s: until the job
    makes steps again, without the reading of the checkpoint.
    """

    gpu_hours: float = GPU_HOURS
    storage: float = STORAGE
    restart_s: float = RESTART_S


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's bytes over all ranks, and seconds: delay_s that the training waits, durable_s from then until it
    is whole on the disk, restart_s until a job that reads it makes steps again.
    """

    size: int
    delay_s: float
    durable_s: float
    restart_s: float

    @classmethod
    def of(cls, trained: int, averaged: int, world: int, failures: Failures) -> Checkpoint:
        """Of fp32 weights, two moments and the EMA, of which each rank copies an even part."""
        size = 4 * (3 * trained + averaged)
        written = size / failures.storage
        return cls(size, DRAIN_S + size / world / HOST_COPY, written, failures.restart_s + written)


@dataclass(frozen=True)
class Loss:
    """Shares of a run's expected time: writing (the waits for checkpoints), rework (of what was not saved), restart."""

    writing: float
    rework: float
    restart: float

    @property
    def total(self) -> float:
        """The share that is not the training's own."""
        return self.writing + self.rework + self.restart


def young(delay: float, mean: float) -> float:
    """Return the seconds between checkpoints by Young's formula."""
    return math.sqrt(2 * delay * mean)


def daly(delay: float, mean: float) -> float:
    """Return the seconds between checkpoints by Daly's higher-order formula."""
    if delay >= 2 * mean:
        return mean
    ratio = delay / (2 * mean)
    return young(delay, mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - delay


def expected_seconds(work: float, checkpoint: Checkpoint, mean: float) -> float:
    """Return the expected seconds per segment of `work` seconds and a checkpoint, in a long run; inf where it would
    hardly ever end.

    Exact for exponential failures. From the moment at which a checkpoint is whole on the disk, a segment a = work + δ
    later the next one is, or the job fails. Then it restarts, E_R = M(e^{R/M} − 1), and needs a + L without a failure:
    M e^{R/M} (e^{(a+L)/M} − 1). With L = 0 this is Daly's M e^{R/M} (e^{a/M} − 1).
    """
    segment = _segment(work, checkpoint)
    if max(segment + checkpoint.durable_s, checkpoint.restart_s) > 300 * mean:
        return math.inf
    restart = checkpoint.restart_s / mean
    again = math.exp(restart) * math.expm1((segment + checkpoint.durable_s) / mean)
    return -math.expm1(-segment / mean) * mean * (1 + math.expm1(restart) + again)


def _segment(work: float, checkpoint: Checkpoint) -> float:
    """A segment without failures; a checkpoint waits for the writing of the one before it."""
    return max(work + checkpoint.delay_s, checkpoint.durable_s)


def expected_loss(work: float, checkpoint: Checkpoint, mean: float) -> Loss:
    """Return the shares of the expected time with `work` seconds between checkpoints."""
    whole = expected_seconds(work, checkpoint, mean)
    if math.isinf(whole):
        return Loss(0.0, 1.0, 0.0)
    writing = (_segment(work, checkpoint) - work) / whole
    # A failure comes once per M of all time, restarts included, and takes R or until the next failure.
    restart = -math.expm1(-checkpoint.restart_s / mean)
    return Loss(writing, 1 - work / whole - writing - restart, restart)


@dataclass(frozen=True)
class Interval:
    """A run on W GPUs with its failures.

    mean_s: between failures of the job. expected: failures in the run. young_s, daly_s: by the formulas. every_steps:
    the recommended interval, Daly's in whole steps, at least the writing of a checkpoint and at most the run.
    interval_s: its seconds. loss: with it. hours: of the run with it; None where it would hardly ever end.
    """

    mean_s: float
    checkpoint: Checkpoint
    expected: float | None
    young_s: float
    daly_s: float
    every_steps: int
    interval_s: float
    loss: Loss
    hours: float | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, failures: Failures, world: int, steps: int, step_s: float) -> Interval:
        """Of a run of `steps` steps of `step_s` seconds."""
        mean = failures.gpu_hours * 3600 / world
        best = daly(checkpoint.delay_s, mean)
        every = min(steps, max(1, round(max(best, checkpoint.durable_s) / step_s)))
        loss = expected_loss(every * step_s, checkpoint, mean)
        hours = steps * step_s / 3600 / (1 - loss.total) if loss.total < 1 else None
        expected = None if hours is None else hours * 3600 / mean
        return cls(
            mean, checkpoint, expected, young(checkpoint.delay_s, mean), best, every, every * step_s, loss, hours
        )

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"lost_share": self.loss.total}
