"""Lists of images: which, in which order, and of which class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.decode.verdicts import Verdict
from iwm_fast.data.randomness import uniforms
from iwm_fast.data.sources import PATIENCE, Labels, Patience, Source, Storage, open_source
from iwm_fast.data.sources.left_out import some
from iwm_fast.data.sources.list_digest import ListSums
from iwm_fast.data.split_layout import Layout, find_layout, refuse_masks, refuse_split_classes, splits_of_shards
from iwm_fast.errors import UserError
from iwm_fast.notices import tell_once

__all__ = ["ImageSet", "divide", "list_images", "split", "test_rows"]

# The random stream of the split of a set without its own; the number is part of every result on such a split.
_SPLIT_STREAM = 0x5711
_TEST_SHARE = 0.2
_CHUNK = 32768  # random numbers at once


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order: sample id i is row i of a source, or rows[i] of a subset.

    common: classes that the labels index, where they differ from the source's own. unlabelled: the number of images
    that a split leaves out because they have no label and others have one.
    """

    source: Source
    rows: NDArray[np.int64] | None = None
    common: tuple[str, ...] | None = None
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def name(self, sample: int) -> str:
        """Return a sample's full name: an absolute path or an address, with its place in a shard."""
        return self.source.storage.shown(self.source_name(sample))

    def source_name(self, sample: int) -> str:
        """Return a sample's name below the root."""
        return self.source.name(self.row(sample))

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded bytes; BadSample where it is unreadable, UserError where all data are gone."""
        return self.source.read(self.row(sample))

    def verdict(self, sample: int, max_pixels: int) -> Verdict | None:
        """Return the source's verdict on a sample; None where it has none.

        max_pixels: None for a larger image, which may have passed another limit.
        """
        found = self.source.verdict(self.row(sample))
        return None if found is None or found[2] * found[3] > max_pixels else found

    @property
    def unchecked(self) -> int:
        """Return the number of samples without a verdict of the source's; of a subset at most so many."""
        return min(len(self), self.source.unchecked)

    @property
    def sums(self) -> ListSums | None:
        """Return the sums of all names and sizes, where the source knows them; None of a subset."""
        return self.source.sums if self.rows is None else None

    def source_rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples' rows in the source."""
        return samples if self.rows is None else self.rows[samples]

    def samples_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Invert `source_rows`."""
        return rows if self.rows is None else self._order[np.searchsorted(self.rows, rows, sorter=self._order)]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        assert self.rows is not None
        return np.argsort(self.rows, kind="stable")

    def describe(self) -> str:
        """Return a description, to follow their number."""
        return f"images of {self.source.describe()}"

    def take(self, rows: NDArray[np.int64]) -> ImageSet:
        """Return the images of the given rows, in that order."""
        return ImageSet(self.source, rows if self.rows is None else self.rows[rows], self.common)

    def stamps(self) -> Iterator[str]:
        """Yield for each sample what changes when it is replaced: its name, its place, and size and change times of its
        file; for an object in an object store its size. Reads no image.
        """
        known: dict[str, str] = {}
        for sample in range(len(self)):
            piece, offset = self.source.extent(self.row(sample))
            stamp = known.get(piece) or _stamp(self.source.storage, piece)
            if offset is not None:  # else each has its own file
                known[piece] = stamp
            yield f"{self.name(sample)} {offset} {stamp}\n"

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 (n,), indices into `classes`, UNLABELLED (-1) for an image without, or None where none has one; the
        first use may read files.
        """
        return self._labelled[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self._labelled[1]

    @cached_property
    def _labelled(self) -> Labels:
        labels, classes = self.source.labels
        if labels is not None and self.rows is not None:
            labels = labels[self.rows]
        if labels is not None and self.common is not None:
            place = {name: label for label, name in enumerate(self.common)}
            labels = np.where(labels < 0, labels, np.array([place[name] for name in classes], np.int64)[labels])
        return labels, classes if self.common is None else self.common

    def row(self, sample: int) -> int:
        """Return the sample's row in the source."""
        return sample if self.rows is None else int(self.rows[sample])


def list_images(root: str | Path, source: str = "auto", patience: Patience = PATIENCE) -> ImageSet:
    """List all images below `root`: a folder, an s3://bucket/prefix, or one shard, TFRecord file or manifest.

    source: a value of data.source; "auto" detects it. patience: with an object store. Raises UserError where there is
    no image.
    """
    return ImageSet(open_source(root, source, patience=patience))


def split(root: str | Path, patience: Patience = PATIENCE, source: str = "auto") -> tuple[ImageSet, ImageSet]:
    """Return (training images, test images), split by `divide`."""
    train, test, _ = divide(root, patience, source)
    return train, test


def divide(root: str | Path, patience: Patience = PATIENCE, source: str = "auto") -> tuple[ImageSet, ImageSet, Layout]:
    """Return (training images, test images, layout), where `layout` says how they were split.

    The labels of both index the same `classes`; where some images have a label, those without are left out with a
    notice. Raises UserError as `list_images`, for an ambiguous layout, and for fewer than two images.
    """
    layout = find_layout(root, patience)
    if layout.how == "folders":
        train, test = (list_images(part, source, patience) for part in (layout.train, layout.test))
        if train.labels is not None and test.labels is not None and train.classes != test.classes:
            classes = tuple(sorted({*train.classes, *test.classes}))
            train, test = ImageSet(train.source, common=classes), ImageSet(test.source, common=classes)
        for part, images in ((layout.train, train), (layout.test, test)):
            refuse_masks(images.classes, part)
            _tell_unlabelled(images, part)
        return (*_both_with_labels(train, test, layout), layout)
    images = list_images(root, source, patience)
    if len(images) < 2:
        raise UserError(f"{root} holds one image only; give at least two, to train on and to test on")
    by_name = _by_shard_names(images, layout)
    if by_name is not None:
        return by_name
    refuse_split_classes(images.classes, str(root))
    is_test = test_rows(len(images))
    _tell_unlabelled(images, str(root))
    train, test = (images.take(np.flatnonzero(rows)) for rows in (~is_test, is_test))
    return (*_both_with_labels(train, test, layout), layout)


def _both_with_labels(train: ImageSet, test: ImageSet, layout: Layout) -> tuple[ImageSet, ImageSet]:
    """Both splits without unlabelled images, where some have a label. Raises UserError where none is left of a
    split.
    """
    whose = [f"{place}: of its images" for place in layout.places]
    if not layout.given:
        whose = [f"{layout.root}: of the images to {what}" for what in ("train on", "test on")]
    learned, tested = (_with_labels(images, what) for images, what in zip((train, test), whose, strict=True))
    return learned, tested


def _by_shard_names(images: ImageSet, layout: Layout) -> tuple[ImageSet, ImageSet, Layout] | None:
    """The two splits by the names of shards or TFRecord files; None where the names do not say."""
    if images.source.kind not in ("webdataset", "tfrecord"):
        return None
    names = [images.source.name(sample) for sample in range(len(images))]
    tar = re.compile(r"\.tar(?=:)", re.IGNORECASE)
    end = ""
    if images.source.kind == "webdataset":
        end = next((found[0] for name in names if (found := tar.search(name))), ".tar")
        files = [tar.split(name, maxsplit=1)[0] for name in names]
    else:
        files = [name.rpartition(":")[0] for name in names]
    parts = splits_of_shards(sorted(set(files)))
    if parts is None:
        return None
    of_rows = np.array([parts[file] for file in files])
    train, test = (images.take(np.flatnonzero(of_rows == part)) for part in ("train", "test"))
    places = {part: sorted(file for file in parts if parts[file] == part) for part in ("train", "test", "unused")}
    shown = {
        part: f"{layout.root}/{names[0]}{end}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for part, names in places.items()
        if names
    }
    unused = (shown["unused"],) if "unused" in shown else ()
    named = Layout(layout.root, shown["train"], shown["test"], "shard names", unused)
    _tell_unlabelled(images, layout.root)
    return (*_both_with_labels(train, test, named), named)


def test_rows(count: int) -> NDArray[np.bool_]:
    """Return which of `count` samples are the test set of a folder without train/ and test/: a fifth, at least one;
    bool (count,).
    """
    draw = np.empty(count)
    for first in range(0, count, _CHUNK):
        ids = np.arange(first, min(first + _CHUNK, count))
        draw[ids] = uniforms(0, 0, ids, _SPLIT_STREAM, 1)[:, 0]
    rows = np.zeros(count, bool)
    rows[np.argsort(draw, kind="stable")[: max(1, round(_TEST_SHARE * count))]] = True
    return rows


def _tell_unlabelled(images: ImageSet, where: str) -> None:
    """Report how many images have no label, where some have one."""
    if images.labels is None:
        return
    rows = np.flatnonzero(images.labels < 0)
    if len(rows):
        names = some((images.source.name(row) for row in rows[:3].tolist()), len(rows))
        tell_once(f"{where}: left out: {len(rows)} of {len(images)} images, which have no label ({names})")


def _with_labels(images: ImageSet, what: str) -> ImageSet:
    """The images with a label, where some have one. Raises UserError where none has."""
    if images.labels is None or np.all(images.labels >= 0):
        return images
    kept = np.flatnonzero(images.labels >= 0)
    if not len(kept):
        raise UserError(
            f"{what} none has a label (the first of {len(images)} is {images.name(0)}), and others have one: label "
            "them, or remove the labels"
        )
    return replace(images.take(kept), unlabelled=len(images) - len(kept))


def _stamp(storage: Storage, piece: str) -> str:
    try:
        status = os.stat(storage.shown(piece))  # noqa: PTH116  (once for each of a million files)
    except OSError:  # an object of an object store, or a missing file
        try:
            return str(storage.size(piece))
        except BadSample:
            return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
