"""Which part of a set is the training set and which the test set, by the names of its folders or shards.

A name is a split's where it is one of these words, in any case, alone or followed by "set", "data", "images", "split"
or a year (``Train``, ``test_set``, ``val2017``): train, training; test, testing; val, valid, validation, dev, eval. The
rule, which docs/guides/data.md repeats:

- one training and one test folder: these two. With both ``test`` and ``val``, ``test`` is the test set and ``val`` is
  not used.
- no such folder: a fixed fifth of the images, by sample id, is the test set. Shards and TFRecord files of one folder
  are split by their own names instead (``set-train-000.tar``, ``validation-00000-of-00128``) where each has such a
  word.
- anything else is refused: two folders for one split, a training folder without another, a split among classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.data.sources import PATIENCE, Patience, top_level
from iwm_fast.data.sources.kinds import MANIFEST_FILE, is_image, is_records, is_shard
from iwm_fast.data.sources.split_names import split_kind, split_template, split_word
from iwm_fast.data.sources.storage import is_folder
from iwm_fast.errors import UserError
from iwm_fast.file_names import printable
from iwm_fast.notices import tell_once

__all__ = [
    "Layout",
    "find_layout",
    "layout_of_folders",
    "refuse_masks",
    "refuse_split_classes",
    "splits_of_shards",
    "tell_of_shard_splits",
    "tell_of_splits",
]

_SPLITS = ("train", "test", "val")
# Names of folders of images, and of their annotations, in public data sets; lower-case letters only.
_PICTURES = frozenset({"images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "rgb"})
_DRAWN = re.compile(r"masks?|labels?|annotations?|segmentation(class|object)?|groundtruth|gt|trimaps?|depths?")
# Class folders to search for splits below them: all classes of a set have the same layout.
_LOOKED_INTO = 8


@dataclass(frozen=True)
class Layout:
    """train, test: the two splits' places as people write them, both ``root`` where it is split by sample id.

    how: "folders", "shard names" or "sample ids". unused: what lies beside the two splits and is not read. same: both
    are one folder, by a link.
    """

    root: str
    train: str
    test: str
    how: str
    unused: tuple[str, ...] = ()
    same: bool = False

    @property
    def given(self) -> bool:
        """Whether the set itself says which images are the test set."""
        return self.how != "sample ids"

    @property
    def places(self) -> tuple[str, str]:
        """The splits as errors call them: (training, test)."""
        if self.given:
            return self.train, self.test
        return f"{self.root}, training images", f"{self.root}, test images"

    def record(self) -> dict[str, Any]:
        """For JSON; ``said``: the same as `line`."""
        splits = {"train": self.train, "test": self.test, "how": self.how, "not_used": list(self.unused)}
        return {**splits, "said": self.line()}

    def line(self) -> str:
        """Return in one line what is the training set and what the test set."""
        rest = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        if not self.given:
            return printable(
                f"{self.root}: no train/ and test/ in it, so a fixed fifth of its images, by sample id, is the test "
                f"set and the rest the training set{rest}"
            )
        same = "; they are one folder, by a link: every test image is a training image" if self.same else ""
        return printable(f"train on {self.train}, test on {self.test}{same}{rest}")


def find_layout(root: str | Path, patience: Patience = PATIENCE) -> Layout:
    """Return the layout of a folder or an s3:// prefix by its folders; by sample id where none has a split's name.

    Raises UserError where it is ambiguous.
    """
    place = _place(root)
    folders, loose = top_level(root, patience)
    layout = layout_of_folders(place, folders, loose)
    if layout is None:
        _refuse_longer_names(place, folders)
        _refuse_splits_below(place, folders, loose)
    return layout or Layout(place, place, place, "sample ids")


def layout_of_folders(place: str, folders: Sequence[str], loose: Sequence[str] = ()) -> Layout | None:
    """Return the layout by the names of the ``folders`` of ``place``; None where none of them is a split's.

    loose: files beside them. Raises UserError where it is ambiguous.
    """
    kinds = {name: split_kind(name) for name in folders}
    if not any(kinds.values()):
        return None
    train, test, others = _choose([name for name in folders if kinds[name] or _holds_samples(place, name)], place)
    unused = [f"{place}/{name}" for name in others]
    if any(_is_sample(name) for name in loose):
        unused.append(f"the files directly in {place}")
    learned, tested = f"{place}/{train}", f"{place}/{test}"
    same = not place.startswith("s3://") and Path(learned).resolve() == Path(tested).resolve()
    return Layout(place, learned, tested, "folders", tuple(unused), same=same)


def splits_of_shards(files: Sequence[str]) -> dict[str, str] | None:
    """Return the split of each shard or TFRecord file by its name: train, test or unused; None where no name has one.

    Raises UserError where only some names have one.
    """
    kinds = {file: split_word(file.rsplit("/", 1)[-1]) for file in files}
    found = set(kinds.values())
    if "train" not in found or not found & {"test", "val"}:
        return None
    strange = [file for file, kind in kinds.items() if kind is None]
    if strange:
        raise UserError(
            f"{printable(strange[0])}: neither train, test nor val stands in its name, as in those of "
            f"{len(files) - len(strange)} others beside it; move it away, or rename it"
        )
    wanted = "test" if "test" in found else "val"
    return {file: {"train": "train", wanted: "test"}.get(str(kind), "unused") for file, kind in kinds.items()}


def refuse_split_classes(classes: Sequence[str], place: str) -> None:
    """Raise UserError where the classes have names of splits, as in a manifest or shards of a whole set."""
    refuse_masks(classes, place)
    found = {name: kind for name in classes if (kind := split_kind(name)) is not None}
    both = "train" in found.values() and len(set(found.values())) > 1
    if both or (found and len(found) == len(classes)):
        raise UserError(
            f"{printable(place)}: its classes are {_list(classes[:5])}, which are names of splits; pack or index each "
            "split by itself, into train/ and test/"
        )
    _refuse_longer_names(place, classes)


def refuse_masks(classes: Sequence[str], place: str) -> None:
    """Raise UserError where the folders taken for classes are images and their masks."""
    letters = {name: re.sub(r"[^a-z]", "", name.lower()) for name in classes}
    pictures = [name for name in classes if letters[name] in _PICTURES]
    drawn = [name for name in classes if _DRAWN.fullmatch(letters[name])]
    if pictures and drawn and len(pictures) + len(drawn) == len(classes):
        raise UserError(
            f"{printable(place)} holds {_list([*pictures, *drawn])}, a set for iwm-fast finetune --task segmentation "
            "(which needs images/ and masks/), and no folders of classes; give "
            f"{printable(place)}/{printable(pictures[0])} for its images alone"
        )


def tell_of_splits(root: str | Path, what: str) -> None:
    """Report once that a folder holds several splits where all of it is used: ``what`` happens to them."""
    if str(root).startswith("s3://"):
        return
    found = [name for name in top_level(root)[0] if split_kind(name) is not None]
    if len({split_kind(name) for name in found}) > 1:
        tell_once(f"{printable(str(root))} holds {_list(found)}, the names of splits: {what}; name one of them alone")


def tell_of_shard_splits(root: str, files: Iterable[str], what: str) -> None:
    """Report once that shards or TFRecord files have names of several splits, as `splits_of_shards` reads them."""
    try:
        parts = splits_of_shards(sorted(re.sub(r"\.tar$", "", file, flags=re.IGNORECASE) for file in files))
    except UserError:  # only some have such names
        return
    if parts is not None:
        first = [next(file for file in parts if parts[file] == part) for part in ("train", "test")]
        shown = " and ".join(map(printable, first))
        tell_once(f"{printable(root)} holds {shown}, files of several splits: {what}; give each split its own folder")


def _choose(folders: Sequence[str], place: str) -> tuple[str, str, list[str]]:
    """(training folder, test folder, the others); at least one of the folders is a split."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in _SPLITS}
    others: list[str] = []
    for name in folders:
        by_kind.get(split_kind(name) or "", others).append(name)
    shown = printable(place)
    for kind, names in by_kind.items():
        if len(names) > 1:
            raise UserError(
                f"{shown} holds {_list(names)}, all of them names of a {kind} split; keep one of them there"
            )
    tested = by_kind["test"] or by_kind["val"]
    if by_kind["train"] and tested:
        return by_kind["train"][0], tested[0], others + (by_kind["val"] if by_kind["test"] else [])
    splits = [name for names in by_kind.values() for name in names]
    if others:
        raise UserError(
            f"{shown} holds {_list(splits)}, a split by its name, among {len(others)} other folders "
            f"({_list(others[:3])}): sort the images into train/ and test/, where every folder is a class, or move it "
            "away"
        )
    lacks = "train/" if tested else "test/ or val/"
    raise UserError(
        f"{shown} holds {_list(splits)} and no {lacks}: add it, or give {shown}/{printable(splits[0])}, of which a "
        "fifth is then tested on"
    )


def _refuse_splits_below(place: str, folders: Sequence[str], loose: Sequence[str]) -> None:
    """Raise UserError where the splits lie one folder further down, below one folder or below each class."""
    if place.startswith("s3://"):
        return
    for name in folders[:_LOOKED_INTO]:
        below = [split_kind(entry) for entry in _folders_of(f"{place}/{name}")]
        if "train" in below and len({kind for kind in below if kind}) > 1:
            inside = printable(f"{place}/{name}")
            if len(folders) == 1 and not loose:
                raise UserError(
                    f"{printable(place)} holds {inside} and nothing else, which holds train/ and test/ (or val/): give "
                    f"{inside}"
                )
            raise UserError(
                f"{inside} holds train/ and test/ (or val/) below a class: sort the images the other way, with train/ "
                "and test/ above the classes"
            )


def _refuse_longer_names(place: str, names: Sequence[str]) -> None:
    """Raise UserError where folders, or classes, differ only by the word of a split: seg_train and seg_test."""
    first: dict[str, str] = {}
    for name in names:
        if split_word(name) is None:
            continue
        other = first.setdefault(split_template(name), name)
        if "train" in (kinds := {split_word(other), split_word(name)}) and len(kinds) > 1:
            raise UserError(
                f"{printable(place)} holds {_list([other, name])}, which look like splits and would be taken for "
                "classes; rename them to train/ and test/, or name one of them alone"
            )


def _place(root: str | Path) -> str:
    return str(root).rstrip("/") or "/"


def _folders_of(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry)]
    except OSError:  # the listing that follows reports it
        return []


def _holds_samples(place: str, name: str) -> bool:
    """Whether a folder has an image, a shard or a TFRecord file below it; in an object store a prefix is never
    empty.
    """
    if place.startswith("s3://"):
        return True
    seen: set[tuple[int, int]] = set()
    for folder, inside, files in os.walk(f"{place}/{name}", followlinks=True):
        status = os.stat(folder)  # noqa: PTH116  (os.walk gives strings)
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = [entry for entry in inside if not entry.startswith(".")]
        if any(_is_sample(file) for file in files):
            return True
    return False


def _is_sample(file: str) -> bool:
    return not file.startswith(".") and (is_image(file) or is_shard(file) or is_records(file) or file == MANIFEST_FILE)


def _list(names: Sequence[str]) -> str:
    return (
        " and ".join(f"{printable(name)}/" for name in names)
        if len(names) < 3
        else ", ".join(f"{printable(name)}/" for name in names)
    )
