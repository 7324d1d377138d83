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

_ESCAPES = "surrogateescape"  # names of files need not be UTF-8
Labels = NDArray[Any]  # int64 (b,), places in `classes`; or uint8 (b, S, S), a class a pixel


class Split(Protocol):
    """Images of one split. ``classes`` is empty where they have none, and all labels are then 0.

    ``label_shape``: () where an image has one label, (S, S) where each pixel has.
    """

    classes: tuple[str, ...]
    label_shape: tuple[int, ...]

    def __len__(self) -> int: ...

    @property
    def bad(self) -> Mapping[str, str]:
        """Why each image that was left out so far cannot be used, by file."""
        ...

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """Take over what an earlier ``read`` left out, and the labels it gave. UserError as ``read`` at its end."""
        ...

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Batches of clean images uint8 (b, S, S, 3) and their labels (b,); may be called again."""
        ...

    def spread(self, count: int) -> Tensor:
        """At most ``count`` images (n, S, S, 3), spread evenly over the split (and its classes, if sorted)."""
        ...

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """The same, with each one's number among those chosen, which does not change where another is left out."""
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

    @property
    def bad(self) -> Mapping[str, str]:
        """None: these are decoded."""
        return {}

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """Nothing is left out."""

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """All in one batch: what reads it takes as much at a time as it wants."""
        yield self.images, self.labels

    def spread(self, count: int) -> Tensor:
        """Images spread evenly."""
        return self.images[torch.from_numpy(evenly_spaced(count, len(self.images)))]

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """The same, numbered."""
        images = self.spread(count)
        return images, list(range(len(images)))

    def fingerprint(self) -> str:
        """Of the bytes of images and labels."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


class FileSplit:
    """Images that are decoded each time they are read. A file that cannot be decoded is left out, and is in ``bad``.

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
        """Why, by file."""
        return self.left_out.reasons

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """In the order of the files.

        UserError, at the end, where none or too few could be decoded, or none of a class.
        """
        labels = self.files.labels if self.files.labels is not None else np.zeros(len(self), np.int64)
        seen = [np.zeros(0, np.int64)]
        for images, rows in self.numbered():
            seen.append(rows)
            yield images, labels[rows]
        self._finish(labels[np.concatenate(seen)])

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """As the protocol says."""
        self.left_out.reasons |= bad
        self._finish(labels)

    def spread(self, count: int) -> Tensor:
        """Images of files spread evenly; fewer where some cannot be decoded. UserError where none can, or too few."""
        return self.numbered_spread(count)[0]

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """The same, with the number of each among the files chosen."""
        part = self.take(evenly_spaced(count, len(self)))
        found = list(part.numbered())
        self.left_out.check()
        part.require_some(sum(len(rows) for _, rows in found))
        return torch.cat([images for images, _ in found]), [int(row) for _, rows in found for row in rows]

    def take(self, rows: NDArray[np.int64]) -> FileSplit:
        """The files of the given rows, a part of this split: what is left out of it is left out of the split."""
        part = self.files.take(rows)
        return FileSplit(part, self._size, self._data, place=self.place, layout=self.layout, left_out=self.left_out)

    def thinned(self, count: int) -> FileSplit:
        """A split of at most ``count`` files, spread evenly over the sorted files and so over the classes."""
        files = replace(self.files.take(evenly_spaced(count, len(self))), unlabelled=self.files.unlabelled)
        return FileSplit(files, self._size, self._data, place=self.place, layout=self.layout)

    def fingerprint(self) -> str:
        """Of each file's path, size and times of change, of the classes, the views' size and data.max_pixels.

        No file is opened.
        """
        digest = hashlib.sha256(repr((self._size, self.classes, self._data.max_pixels)).encode(errors=_ESCAPES))
        labels = np.zeros(len(self), np.int64) if self.files.labels is None else self.files.labels
        digest.update(labels.tobytes())
        for stamp in self.files.stamps():
            digest.update(stamp.encode(errors=_ESCAPES))
        return digest.hexdigest()

    def numbered(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Batches of clean images and their rows (b,) among the files; what cannot be decoded is noted in ``bad``."""
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
        """UserError where there are files and ``decoded``, those that could be, is 0."""
        if len(self) and not decoded:
            name, reason = next(iter(self.bad.items()))
            raise UserError(printable(f"{name}: {reason}; none of the {len(self)} images of its split can be decoded"))

    def _finish(self, labels: Labels) -> None:
        """UserError where too much was left out of the whole split; ``labels``: of what was not."""
        self.left_out.check()
        if self.left_out.total == len(self):  # of a part, other parts may have what it lacks
            self.require_some(len(labels))
            self.left_out.require_classes(self.files.labels, labels, self.classes)


def cannot_classify(train: Split | None, test: Split) -> str | None:
    """Why probes cannot run, or None."""
    if train is None:
        return "no training images were given"
    if len(train.classes) < 2:
        return "the images have no classes (a folder a class is needed)"
    if train.classes != test.classes:
        return f"train has {len(train.classes)} classes and test has {len(test.classes)}: they are not the same"
    return None


def require_same_classes(train: FileSplit, test: FileSplit) -> None:
    """UserError where the set says what is tested on, and one split has no image of a class that the other has, or has
    images beside the folders of its classes.

    A split that we made ourselves may miss a small class by chance; that is no mistake of the user's.
    """
    given = train.layout is not None and train.layout.given
    if not (train.classes or test.classes) or not given:
        return
    present = {}
    for name, part in (("train", train), ("test", test)):
        if part.files.labels is None:
            raise UserError(
                f"{printable(part.place)} has no folder a class, and the other split has; sort its images likewise"
            )
        if part.files.unlabelled and part.files.source.kind == "folder":
            raise UserError(
                f"{printable(part.place)} holds {part.files.unlabelled} images beside the folders of its classes; sort "
                "them into these, or move them away"
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
    """Training and test images below ``root`` at the model's size, as ``image_list.divide`` divides them.

    ``limit``: at most so many files of each, spread evenly over the sorted files and so over the classes. ``source``: a
    value of data.source, of these images. UserError where ``root`` is missing, empty, without images or ambiguous.
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
    """For JSON: which part of the set is which split, and what was left out of each."""
    layout = {} if train.layout is None else {"splits": train.layout.record()}
    return layout | {"left_out": {"train": train.left_out.record(), "test": test.left_out.record()}}
