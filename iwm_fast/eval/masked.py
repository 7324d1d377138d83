"""Clean images with a class for each pixel, read as the other splits are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.segmentation import MaskedSet, read_mask, split_masked
from iwm_fast.eval.splits import FileSplit, Labels
from iwm_fast.eval.stats import evenly_spaced

__all__ = ["MaskedSplit", "open_masked_splits"]


class MaskedSplit:
    """Images and masks that are decoded each time they are read; an image that cannot be decoded is left out."""

    def __init__(self, pairs: MaskedSet, config: Config) -> None:
        self.pairs = pairs
        self.classes: tuple[str, ...] = ()  # an image has no class of its own
        self._size = config.model.image
        self.label_shape: tuple[int, ...] = (self._size, self._size)
        self._images = FileSplit(pairs.images, self._size, device=config.data.device, threads=config.data.threads)

    @property
    def bad(self) -> dict[str, str]:
        """Why each image that was left out could not be decoded."""
        return self._images.bad

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Images uint8 (b, S, S, 3) and masks uint8 (b, S, S), in the order of the files."""
        for images, rows in self._images.numbered():
            masks = [read_mask(self.pairs.masks[row], self._size, self.pairs.image(row)) for row in rows]
            yield images, np.stack(masks)

    def spread(self, count: int) -> Tensor:
        """Images of files spread evenly."""
        return torch.cat([images for images, _ in self._images.take(evenly_spaced(count, len(self))).read()])

    def fingerprint(self) -> str:
        """Of each image's and each mask's path, size and time of change."""
        digest = hashlib.sha256(self._images.fingerprint().encode())
        for path in self.pairs.masks:
            status = path.stat()
            digest.update(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def open_masked_splits(root: Path, config: Config, *, limit: int | None = None) -> tuple[MaskedSplit, MaskedSplit]:
    """Training and test images below ``root``, as ``data.segmentation.split_masked`` divides them.

    ``limit``: at most so many training images, spread evenly over the sorted files.
    """
    train, test = split_masked(root)
    if limit is not None:
        train = train.take(evenly_spaced(limit, len(train)))
    return MaskedSplit(train, config), MaskedSplit(test, config)
