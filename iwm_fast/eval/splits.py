"""Clean labelled images, batch by batch: from files as evaluation reads them, or from memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.clean import load_clean
from iwm_fast.data.files import ImageSet, split
from iwm_fast.data.sources import Patience
from iwm_fast.errors import UserError
from iwm_fast.eval.stats import evenly_spaced

__all__ = ["FileSplit", "Split", "TensorSplit", "open_splits"]

Labels = NDArray[np.int64]


class Split(Protocol):
    """Images of one split. ``classes`` is empty where they have none, and all labels are then 0."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Batches of clean images uint8 (b, S, S, 3) and their labels (b,); may be called again."""
        ...

    def spread(self, count: int) -> Tensor:
        """At most ``count`` images (n, S, S, 3), spread evenly over the split (and its classes, if sorted)."""
        ...


class TensorSplit:
    """Images that lie in memory."""

    def __init__(self, images: Tensor, labels: Labels | None = None, classes: tuple[str, ...] = ()) -> None:
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels has {len(labels)} entries for {len(images)} images; they must be as many")
        self.images = images
        self.labels = np.zeros(len(images), np.int64) if labels is None else labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """All in one batch: what reads it takes as much at a time as it wants."""
        yield self.images, self.labels

    def spread(self, count: int) -> Tensor:
        """Images spread evenly."""
        return self.images[torch.from_numpy(evenly_spaced(count, len(self.images)))]


class FileSplit:
    """Images that are decoded each time they are read. A file that cannot be decoded is left out, and is in ``bad``."""

    def __init__(self, files: ImageSet, size: int, *, device: str = "auto", threads: int | None = None) -> None:
        self.files = files
        self.classes = files.classes
        self.bad: dict[str, str] = {}  # why, by file
        self._size = size
        self._device = device
        self._threads = threads

    def __len__(self) -> int:
        return len(self.files)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """In the order of the files. UserError, at the end, where none could be decoded."""
        yield from self._read(self.files)

    def spread(self, count: int) -> Tensor:
        """Images of files spread evenly; fewer where some cannot be decoded."""
        chosen = self.files.take(evenly_spaced(count, len(self.files)))
        return torch.cat([images for images, _ in self._read(chosen)])

    def _read(self, files: ImageSet) -> Iterator[tuple[Tensor, Labels]]:
        labels = files.labels if files.labels is not None else np.zeros(len(files), np.int64)
        some = False
        for clean in load_clean(files, self._size, device=self._device, threads=self._threads):
            self.bad |= {files.name(row): reason for row, reason in clean.failed.items()}
            if len(clean.rows):
                some = True
                yield clean.images, labels[clean.rows]
        if not some:
            name, reason = next(iter(self.bad.items()))
            raise UserError(f"{name}: {reason}; none of the {len(files)} images of its split can be decoded")


def open_splits(root: str | Path, config: Config, *, limit: int | None = None) -> tuple[FileSplit, FileSplit]:
    """Training and test images below ``root`` at the model's size, as ``data.files.split`` divides them.

    ``limit``: at most so many files of each, spread evenly over the sorted files and so over the classes. UserError
    where ``root`` is missing, empty or without images.
    """
    both = []
    for files in split(root, Patience(config.data.store_timeout, config.data.store_attempts)):
        kept = files if limit is None else files.take(evenly_spaced(limit, len(files)))
        both.append(FileSplit(kept, config.model.image, device=config.data.device, threads=config.data.threads))
    return both[0], both[1]
