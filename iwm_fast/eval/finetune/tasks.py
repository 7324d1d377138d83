"""A task: labelled training features, a tenth held out to choose a learning rate, and test features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.held_out import held_out_rows
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.models.task_model import HeadShape

__all__ = ["Task", "batches", "in_order"]


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
        """Hold out a tenth: of each class or, if each pixel has a class, spread evenly over the images.

        Raise ValueError if nothing is left to hold out or to train on.
        """
        if shape.dense:
            held = np.zeros(len(train), bool)
            held[evenly_spaced(max(1, round(len(train) / 10)), len(train))] = True
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
    parts = max(1, min(-(-len(rows) // size), len(rows) // 2))
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for part in np.array_split(order, parts):
            yield tensors(task.train, np.sort(part))  # ascending: sequential reads from disk
        epoch += 1


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
