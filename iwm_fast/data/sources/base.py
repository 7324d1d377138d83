"""The interface of a source of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.verdicts import Verdict
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.list_digest import ListSums
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.sources.storage import Storage

__all__ = [
    "UNLABELLED",
    "Labels",
    "Packed",
    "Source",
    "Unindexed",
    "below_common_folders",
    "folder_classes",
    "folder_labels",
    "number_labels",
    "top_folder",
]

# (labels: int64 (n,), indices into the classes, UNLABELLED for an image without, or None where none has one; the
# classes' names)
UNLABELLED = -1
Labels = tuple[NDArray[np.int64] | None, tuple[str, ...]]


class Source(Protocol):
    """Images in a fixed order, each with a stable name, readable in any order at any time.

    Random access lets the order of a training be a function of (seed, position) alone: every rank sees all samples of
    all shards by index and reads its share of the global order, so any number of ranks reads the same samples in the
    same order. Sources are picklable.
    """

    storage: Storage
    kind: str  # folder, webdataset, tfrecord: the values of data.source
    left_out: LeftOut  # files that are no sample

    def __len__(self) -> int: ...

    def name(self, sample: int) -> str:
        """Return a sample's name below the storage's root."""
        ...

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded image. BadSample where it is unreadable, UserError where the whole place is
        gone.
        """
        ...

    def size(self, sample: int) -> int:
        """Return the bytes of a sample's encoded image. Errors as `read`."""
        ...

    def extent(self, sample: int) -> tuple[str, int | None]:
        """Return (the storage's file that holds the encoded image, its offset there, or None where it is the
        whole file).
        """
        ...

    @property
    def labels(self) -> Labels:
        """The classes; the first use may read everything."""
        ...

    @property
    def unchecked(self) -> int:
        """Return the number of samples without a verdict."""
        ...

    def verdict(self, sample: int) -> Verdict | None:
        """Return the verdict on a sample where it is known without reading; `read` then returns no other bytes than
        these.
        """
        ...

    @property
    def sums(self) -> ListSums | None:
        """Return the sums of all names and sizes, where they are known without going over them."""
        ...

    def shards(self) -> dict[str, int] | None:
        """Return the number of samples in each file that holds several; None for images in their own files, and
        where it is not known without going over all samples.
        """
        ...

    def describe(self) -> str:
        """Return a few words on the source."""
        ...


@runtime_checkable
class Packed(Protocol):
    """What a source has besides whose samples are parts of larger files: many parts may be read at once, and unpacked
    one by one. Methods only: to look for a property, as `isinstance` does, would read all labels.
    """

    def span(self, sample: int) -> tuple[str, int, int]:
        """Return (the storage's file, offset, length) of the bytes that `read` reads. UserError as there."""
        ...

    def unpack(self, sample: int, raw: bytes) -> bytes:
        """Return the encoded image in the bytes of a sample's span, fewer where the file ends before, as `read` does.
        BadSample where they are not what the source lists.
        """
        ...


class Unindexed:
    """What a source knows of its samples before it has read them: nothing but their number."""

    sums: ListSums | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def unchecked(self) -> int:
        """All of them."""
        return len(self)

    def verdict(self, sample: int) -> Verdict | None:  # noqa: ARG002  (a Source's)
        """None."""
        return None

    def shards(self) -> dict[str, int] | None:
        """None."""
        return None


def folder_labels(names: list[str]) -> Labels:
    """Return labels by the first folder of each name, where there are at least two.

    Names without a folder are unlabelled; where most are, the folders are no classes.
    """
    return _placed([top_folder(name) for name in names], list(folder_classes(names)))


def folder_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the classes that `folder_labels` gives, of any number of names."""
    counts = Counter(map(top_folder, names))
    if 2 * counts[""] > counts.total():
        return ()
    classes = tuple(sorted(counts.keys() - {""}))
    return classes if len(classes) > 1 else ()


def top_folder(name: str) -> str:
    """Return the first folder of a name, "" where it has none."""
    return name.split("/", 1)[0] if "/" in name else ""


def below_common_folders(names: Sequence[str], shards: Sequence[int]) -> list[str]:
    """Return names of members without the folders above their classes, which ``tar cf train.tar train/`` adds.

    These are a first folder with the name of a split that all of a shard share, and one that all shards share. A folder
    stays where most of its images lie in no other folder. shards: the shard of each name.
    """
    found = list(names)
    rows: dict[int, list[int]] = {}
    for row, shard in enumerate(shards):
        rows.setdefault(shard, []).append(row)
    groups = [(part, True) for part in rows.values()] + [(list(range(len(found))), False)]
    stripped = True
    while stripped:
        stripped = False
        for group, by_split in groups:
            top = found[group[0]].split("/", 1)[0] if group else ""
            if (
                (not by_split or split_kind(top) is not None)
                and all(found[row].startswith(f"{top}/") for row in group)
                and 2 * sum(found[row].count("/") > 1 for row in group) >= len(group) > 0
            ):
                for row in group:
                    found[row] = found[row].split("/", 1)[1]
                stripped = True
    return found


def number_labels(values: list[str]) -> Labels:
    """Return labels from a text per sample: whole numbers are sorted as numbers, other texts as texts; "" is none."""
    found = {*values} - {""}
    numbers = all(value.removeprefix("-").isdecimal() for value in found)
    if numbers:  # 07 and 7 are one class
        plain = {value: str(int(value)) for value in found} | {"": ""}
        values = [plain[value] for value in values]
        found = {*values} - {""}
    return _placed(values, sorted(found, key=int) if numbers else sorted(found))


def _placed(values: list[str], classes: list[str]) -> Labels:
    if len(classes) < 2:
        return None, ()
    place = {name: label for label, name in enumerate(classes)} | {"": UNLABELLED}
    return np.array([place[value] for value in values], np.int64), tuple(classes)
