"""Clean labelled images, batch by batch: from files as evaluation reads them, or from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config, DataConfig
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import ImageSet, divide
from iwm_fast.data.sources import Patience
from iwm_fast.data.split_layout import Layout
from iwm_fast.errors import UserError
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.unusable import LeftOut
from iwm_fast.file_names import printable

__all__ = [
    "FileSplit",
    "Split",
    "TensorSplit",
    "cannot_classify",
    "open_splits",
    "require_same_classes",
    "splits_record",
]

_ESCAPES = "surrogateescape"  # file names need not be UTF-8
Labels = NDArray[Any]  # int64 (b,), indices into `classes`; or uint8 (b, S, S), a class per pixel


class Split(Protocol):
    """Images of one split. ``classes`` is empty if they have none, and all labels are then 0.

    ``label_shape``: () if an image has one label, (S, S) if each pixel has.
    """

    classes: tuple[str, ...]
    label_shape: tuple[int, ...]

    def __len__(self) -> int: ...

    @property
    def bad(self) -> Mapping[str, str]:
        """Why each image that was left out so far is unusable, by file."""
        ...

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """Adopt what an earlier ``read`` left out, and its labels. Raise UserError as ``read`` does at its end."""
        ...

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Yield batches of clean images uint8 (b, S, S, 3) and their labels (b,); repeatable."""
        ...

    def spread(self, count: int) -> Tensor:
        """Return at most ``count`` images (n, S, S, 3), spread evenly over the split (and its classes, if sorted)."""
        ...

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """Return the same, with each one's number among those chosen, which skips images that are left out."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the images and their labels: equal only if ``read`` gives the same."""
        ...


class TensorSplit:
    """Images in memory, with labels (n,) or (n, S, S)."""

    def __init__(self, images: Tensor, labels: Labels | None = None, classes: tuple[str, ...] = ()) -> None:
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels has {len(labels)} entries for {len(images)} images; give one per image")
        self.images = images
        self.labels = np.zeros(len(images), np.int64) if labels is None else labels
        self.classes = classes
        self.label_shape = self.labels.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bad(self) -> Mapping[str, str]:
        """None: these are decoded."""
        return {}

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """Nothing is left out."""

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Yield all in one batch: the reader divides it as it needs."""
        yield self.images, self.labels

    def spread(self, count: int) -> Tensor:
        """Return evenly spread images."""
        return self.images[torch.from_numpy(evenly_spaced(count, len(self.images)))]

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """The same, numbered."""
        images = self.spread(count)
        return images, list(range(len(images)))

    def fingerprint(self) -> str:
        """Return a digest of the bytes of images and labels."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


class FileSplit:
    """Images that are decoded at each read. Files that cannot be decoded are left out, and are in ``bad``.

    ``data``: how they are decoded, and which share of them may be left out. ``place``: of the split, for errors.
    """

    def __init__(
        self,
        files: ImageSet,
        size: int,
        data: DataConfig,
        *,
        place: str = "images",
        layout: Layout | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.files = files
        self.classes = files.classes
        self.label_shape: tuple[int, ...] = ()
        self.place, self.layout = place, layout
        whole = LeftOut(place, len(files), data.max_bad_fraction, unlabelled=files.unlabelled)
        self.left_out = left_out if left_out is not None else whole
        self._size, self._data = size, data

    def __len__(self) -> int:
        return len(self.files)

    @property
    def bad(self) -> dict[str, str]:
        """Reasons by file."""
        return self.left_out.reasons

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Yield batches in the order of the files.

        Raise UserError, at the end, if too few could be decoded, or none of a class.
        """
        labels = self.files.labels if self.files.labels is not None else np.zeros(len(self), np.int64)
        seen = [np.zeros(0, np.int64)]
        for images, rows in self.numbered():
            seen.append(rows)
            yield images, labels[rows]
        self._finish(labels[np.concatenate(seen)])

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """As in the protocol."""
        self.left_out.reasons |= bad
        self._finish(labels)

    def spread(self, count: int) -> Tensor:
        """Return images of evenly spread files that can be decoded. Raise UserError if none can, or too few."""
        return self.numbered_spread(count)[0]

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """Return the same, with each one's number among the chosen files."""
        part = self.take(evenly_spaced(count, len(self)))
        found = list(part.numbered())
        self.left_out.check()
        part.require_some(sum(len(rows) for _, rows in found))
        return torch.cat([images for images, _ in found]), [int(row) for _, rows in found for row in rows]

    def take(self, rows: NDArray[np.int64]) -> FileSplit:
        """Return the files of the given rows as a part of this split: what it leaves out, the split leaves out."""
        part = self.files.take(rows)
        return FileSplit(part, self._size, self._data, place=self.place, layout=self.layout, left_out=self.left_out)

    def thinned(self, count: int) -> FileSplit:
        """Return a split of at most ``count`` files, spread evenly over the sorted files and so over the classes."""
        files = replace(self.files.take(evenly_spaced(count, len(self))), unlabelled=self.files.unlabelled)
        return FileSplit(files, self._size, self._data, place=self.place, layout=self.layout)

    def fingerprint(self) -> str:
        """Return a digest of each file's path, size and times of change, the classes, the views' size, data.max_pixels.

        No file is opened.
        """
        digest = hashlib.sha256(repr((self._size, self.classes, self._data.max_pixels)).encode(errors=_ESCAPES))
        labels = np.zeros(len(self), np.int64) if self.files.labels is None else self.files.labels
        digest.update(labels.tobytes())
        for stamp in self.files.stamps():
            digest.update(stamp.encode(errors=_ESCAPES))
        return digest.hexdigest()

    def numbered(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Yield batches of clean images and their rows (b,) among the files; ``bad`` gets undecodable ones."""
        data = self._data
        for clean in load_clean(
            self.files,
            self._size,
            device=data.device,
            threads=data.threads,
            max_pixels=data.max_pixels,
            wait_s=data.wait_s,
            readers=data.readers,
            hw_decoder_load=data.hw_decoder_load,
        ):
            self.bad.update({self.files.name(row): reason for row, reason in clean.failed.items()})
            if len(clean.rows):
                yield clean.images, clean.rows

    def require_some(self, decoded: int) -> None:
        """Raise UserError if there are files and ``decoded``, the number of decodable ones, is 0."""
        if len(self) and not decoded:
            name, reason = next(iter(self.bad.items()))
            raise UserError(printable(f"{name}: {reason}; none of the {len(self)} images of its split can be decoded"))

    def _finish(self, labels: Labels) -> None:
        """Raise UserError if too much of the whole split was left out; ``labels``: of what was not."""
        self.left_out.check()
        if self.left_out.total == len(self):  # other parts may have what a part lacks
            self.require_some(len(labels))
            self.left_out.require_classes(self.files.labels, labels, self.classes)


def cannot_classify(train: Split | None, test: Split) -> str | None:
    """Return why probes cannot run, or None."""
    if train is None:
        return "no training images were given"
    if len(train.classes) < 2:
        return "the images have no classes; sort them into one folder per class"
    if train.classes != test.classes:
        return f"train has {len(train.classes)} classes and test has {len(test.classes)}: they differ"
    return None


def require_same_classes(train: FileSplit, test: FileSplit) -> None:
    """Raise UserError if the set defines its test split, and one split lacks a class that the other has, or has images
    beside its class folders.

    A split that we made ourselves may lack a small class by chance; that is no error of the user's.
    """
    given = train.layout is not None and train.layout.given
    if not (train.classes or test.classes) or not given:
        return
    present = {}
    for name, part in (("train", train), ("test", test)):
        if part.files.labels is None:
            raise UserError(
                f"{printable(part.place)}: no class folders, and the other split has some; sort its images likewise"
            )
        if part.files.unlabelled and part.files.source.kind == "folder":
            raise UserError(
                f"{printable(part.place)}: {part.files.unlabelled} images are beside the class folders; sort them into "
                "these, or move them away"
            )
        present[name] = {part.classes[label] for label in np.unique(part.files.labels)}
    for name, other, lacking, having in (("test", "train", test, train), ("train", "test", train, test)):
        missing = sorted(present[other] - present[name])
        if missing:
            shown = ", ".join(map(printable, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise UserError(
                f"{printable(lacking.place)} has no image of {len(missing)} of the {len(present[other])} classes of "
                f"{printable(having.place)} ({shown}); add some, or remove these classes"
            )


def open_splits(
    root: str | Path, config: Config, *, limit: int | None = None, source: str = "auto"
) -> tuple[FileSplit, FileSplit]:
    """Return training and test images below ``root`` at the model's size, as ``image_list.divide`` divides them.

    ``limit``: at most this many files of each, spread evenly over the sorted files and so over the classes. ``source``:
    a value of data.source. Raise UserError if ``root`` is missing, empty, without images or ambiguous.
    """
    *both, layout = divide(root, Patience.of(config.data), source)
    train, test = (
        FileSplit(files, config.model.image, config.data, place=place, layout=layout)
        for files, place in zip(both, layout.places, strict=True)
    )
    return (train, test) if limit is None else (train.thinned(limit), test.thinned(limit))


class _Read(Protocol):
    @property
    def layout(self) -> Layout | None: ...

    @property
    def left_out(self) -> LeftOut: ...


def splits_record(train: _Read, test: _Read) -> dict[str, Any]:
    """Return a record for JSON: which part of the set is which split, and what was left out of each."""
    layout = {} if train.layout is None else {"splits": train.layout.record()}
    return layout | {"left_out": {"train": train.left_out.record(), "test": test.left_out.record()}}
