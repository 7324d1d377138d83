"""A task: labelled training features, a tenth held out to choose a learning rate, and test features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.finetune.scores import IGNORED
from iwm_fast.eval.held_out import held_out_rows
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.models.task_model import HeadShape

__all__ = ["Task", "batches", "in_order", "steps_per_epoch"]


@dataclass(frozen=True, eq=False)
class Task:
    """name; the head's shape; features of the training and of the test images; held: bool (n,), the training images
    that are held out.
    """

    name: str
    shape: HeadShape
    train: Features
    test: Features
    held: np.ndarray

    @classmethod
    def of(cls, name: str, shape: HeadShape, train: Features, test: Features) -> Task:
        """Hold out a tenth: of each class or, if each pixel has a class, spread evenly over the images with such a
        pixel.

        Raise ValueError if nothing is left to hold out or to train on, and if no test image can be scored.
        """
        if shape.dense:
            known, tested = ((part.labels != IGNORED).any(axis=(1, 2)) for part in (train, test))
            if not tested.any() or known.sum() < 2:
                part, count = ("test", len(test)) if known.sum() >= 2 else ("training", len(train))
                raise ValueError(f"{name}: of its {count} {part} masks too few have a pixel that is not {IGNORED}")
            held = np.zeros(len(train), bool)
            scored = np.flatnonzero(known)
            held[scored[evenly_spaced(max(1, round(len(scored) / 10)), len(scored))]] = True
        else:
            held = held_out_rows(train.labels)
        if not held.any() or (~held).sum() < 2:
            raise ValueError(f"{name} has {len(train)} training images, too few to hold out a tenth; give more")
        return cls(name, shape, train, test, held)


def batches(task: Task, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training rows endlessly, in a new order each epoch: inputs and labels on the CPU.

    Batches of one epoch differ by at most one row; none has a single row, which has no variance to normalise by.
    """
    rows = np.flatnonzero(~task.held)
    parts = steps_per_epoch(len(rows), size)
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for part in np.array_split(order, parts):
            yield tensors(task.train, np.sort(part))  # ascending: sequential reads from disk
        epoch += 1


def steps_per_epoch(rows: int, size: int) -> int:
    """Return the number of batches of at most ``size`` rows, two or more in each, that an epoch is divided into."""
    return max(1, min(-(-rows // size), rows // 2))


def in_order(features: Features, rows: np.ndarray | None = None, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the given rows, default all, in order."""
    chosen = np.arange(len(features)) if rows is None else rows
    for first in range(0, len(chosen), size):
        yield tensors(features, chosen[first : first + size])


def tensors(features: Features, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return a reader's inputs: uint8 images, or float32 tokens (b, L, D), of which a mean token is one."""
    values = torch.from_numpy(features.values[rows])
    labels = torch.from_numpy(features.labels[rows].astype(np.int64))
    if values.dtype == torch.uint8:
        return values, labels
    return (values[:, None] if values.ndim == 2 else values).float(), labels
