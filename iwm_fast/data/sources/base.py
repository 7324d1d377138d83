"""What a source of images is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.verdicts import Verdicts
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.sources.storage import Storage

__all__ = ["UNLABELLED", "Labels", "Source", "below_common_folders", "folder_labels", "number_labels"]

# (labels: int64 (n,), places in the classes, UNLABELLED for an image without, or None where none has one; the classes'
# names, in the order of the labels)
UNLABELLED = -1
Labels = tuple[NDArray[np.int64] | None, tuple[str, ...]]


class Source(Protocol):
    """Images in a fixed order, each with a name of its own that stays, and any of them readable at any time.

    Random access is what lets the order of a training be a function of (seed, position) alone: every rank sees all
    samples of all shards by their number and reads those of its share of the global order, so shards are not divided
    among ranks, and the same samples come in the same order on any number of them. Sources are picklable.
    """

    storage: Storage
    kind: str  # folder, webdataset, tfrecord: the values of data.source
    left_out: LeftOut  # what was found and is no sample

    def __len__(self) -> int: ...

    def name(self, sample: int) -> str:
        """A sample's name below the storage's root."""
        ...

    def read(self, sample: int) -> bytes:
        """A sample's encoded image. BadSample where it cannot be had, UserError where the whole place is gone."""
        ...

    def size(self, sample: int) -> int:
        """Bytes of a sample's encoded image. Errors as `read`."""
        ...

    def extent(self, sample: int) -> tuple[str, int | None]:
        """(the storage's piece that holds the encoded image, its offset there or None where it is the whole piece)."""
        ...

    @property
    def labels(self) -> Labels:
        """Classes; the first use may have to read all that is there."""
        ...

    @property
    def verdicts(self) -> Verdicts | None:
        """Of each sample, where they are known without reading it; `read` then gives no other bytes than these."""
        ...

    def describe(self) -> str:
        """A few words: what these images come from."""
        ...


def folder_labels(names: list[str]) -> Labels:
    """The first folder of each name is its class, where there are at least two.

    What lies in none is unlabelled; where that is most, the folders are no classes.
    """
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    if 2 * folders.count("") > len(folders):
        return None, ()
    return _placed(folders, sorted({*folders} - {""}))


def below_common_folders(names: Sequence[str], shards: Sequence[int]) -> list[str]:
    """Names of members without the folders above their classes: what ``tar cf train.tar train/`` puts before them.

    These are a first folder that all of a shard share and that has the name of a split, and one that all shards share.
    A folder stays where most of what lies in it lies in no other folder. shards: the shard of each name.
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
    """Labels from a text for each sample: whole numbers are sorted as numbers, other texts as texts; "" is none."""
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
