"""Clean labelled images, batch by batch: from files as evaluation reads them, or from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.clean import load_clean
from iwm_fast.data.files import ImageSet, split
from iwm_fast.data.sources import Patience, holds
from iwm_fast.errors import UserError
from iwm_fast.eval.stats import evenly_spaced

__all__ = ["FileSplit", "Split", "TensorSplit", "cannot_classify", "open_splits", "require_same_classes"]

Labels = NDArray[Any]  # int64 (b,), places in `classes`; or uint8 (b, S, S), a class a pixel


class Split(Protocol):
    """Images of one split. ``classes`` is empty where they have none, and all labels are then 0.

    ``label_shape``: () where an image has one label, (S, S) where each pixel has.
    """

    classes: tuple[str, ...]
    label_shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Batches of clean images uint8 (b, S, S, 3) and their labels (b,); may be called again."""
        ...

    def spread(self, count: int) -> Tensor:
        """At most ``count`` images (n, S, S, 3), spread evenly over the split (and its classes, if sorted)."""
        ...

    def fingerprint(self) -> str:
        """A digest of which images these are, and of their labels: equal only where ``read`` gives the same."""
        ...


class TensorSplit:
    """Images that lie in memory, with labels (n,) or (n, S, S)."""

    def __init__(self, images: Tensor, labels: Labels | None = None, classes: tuple[str, ...] = ()) -> None:
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels has {len(labels)} entries for {len(images)} images; they must be as many")
        self.images = images
        self.labels = np.zeros(len(images), np.int64) if labels is None else labels
        self.classes = classes
        self.label_shape = self.labels.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """All in one batch: what reads it takes as much at a time as it wants."""
        yield self.images, self.labels

    def spread(self, count: int) -> Tensor:
        """Images spread evenly."""
        return self.images[torch.from_numpy(evenly_spaced(count, len(self.images)))]

    def fingerprint(self) -> str:
        """Of the bytes of images and labels."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


class FileSplit:
    """Images that are decoded each time they are read. A file that cannot be decoded is left out, and is in ``bad``."""

    def __init__(self, files: ImageSet, size: int, *, device: str = "auto", threads: int | None = None) -> None:
        self.files = files
        self.classes = files.classes
        self.label_shape: tuple[int, ...] = ()
        self.bad: dict[str, str] = {}  # why, by file
        self._size = size
        self._device = device
        self._threads = threads

    def __len__(self) -> int:
        return len(self.files)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """In the order of the files. UserError, at the end, where none could be decoded."""
        labels = self.files.labels if self.files.labels is not None else np.zeros(len(self), np.int64)
        for images, rows in self.numbered():
            yield images, labels[rows]

    def spread(self, count: int) -> Tensor:
        """Images of files spread evenly; fewer where some cannot be decoded."""
        chosen = self.thinned(count)
        images = torch.cat([images for images, _ in chosen.read()])
        self.bad |= chosen.bad
        return images

    def take(self, rows: NDArray[np.int64]) -> FileSplit:
        """The files of the given rows."""
        return FileSplit(self.files.take(rows), self._size, device=self._device, threads=self._threads)

    def fingerprint(self) -> str:
        """Of each file's path, size and time of change, of the classes and of the views' size; no file is opened."""
        digest = hashlib.sha256(repr((self._size, self.classes)).encode())
        labels = np.zeros(len(self), np.int64) if self.files.labels is None else self.files.labels
        digest.update(labels.tobytes())
        for stamp in self.files.stamps():
            digest.update(stamp.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def thinned(self, count: int) -> FileSplit:
        """At most ``count`` files, spread evenly over the sorted files and so over the classes."""
        return self.take(evenly_spaced(count, len(self)))

    def numbered(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Batches of clean images and their rows (b,) among the files. UserError as ``read``."""
        some = False
        for clean in load_clean(self.files, self._size, device=self._device, threads=self._threads):
            self.bad |= {self.files.name(row): reason for row, reason in clean.failed.items()}
            if len(clean.rows):
                some = True
                yield clean.images, clean.rows
        if not some:
            name, reason = next(iter(self.bad.items()))
            raise UserError(f"{name}: {reason}; none of the {len(self)} images of its split can be decoded")


def cannot_classify(train: Split | None, test: Split) -> str | None:
    """Why probes cannot run, or None."""
    if train is None:
        return "no training images were given"
    if len(train.classes) < 2:
        return "the images have no classes (a folder a class is needed)"
    if train.classes != test.classes:
        return f"train has {len(train.classes)} classes and test has {len(test.classes)}: they are not the same"
    return None


def require_same_classes(train: FileSplit, test: FileSplit, root: str | Path) -> None:
    """UserError where ``root`` has train/ and test/ and one of them has no image of a class that the other has.

    A split that we made ourselves may miss a small class by chance; that is no mistake of the user's.
    """
    if not (train.classes or test.classes) or not (holds(root, "train") and holds(root, "test")):
        return
    place = str(root).rstrip("/")
    present = {}
    for name, part in (("train", train), ("test", test)):
        if part.files.labels is None:
            raise UserError(f"{place}/{name} has no folder a class, and the other split has; sort its images likewise")
        present[name] = {part.classes[label] for label in np.unique(part.files.labels)}
    for name, other in (("test", "train"), ("train", "test")):
        missing = sorted(present[other] - present[name])
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise UserError(
                f"{place}/{name} has no image of {len(missing)} of the {len(present[other])} classes of "
                f"{place}/{other} ({shown}); add some, or remove these classes"
            )


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
