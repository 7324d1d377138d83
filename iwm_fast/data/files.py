"""Which images there are, in which order, and of which class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.randomness import uniforms
from iwm_fast.errors import UserError

__all__ = ["EXTENSIONS", "ImageSet", "list_images", "split"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})

# Of the split of a folder without train/ and test/; the number is part of every result made with such a split.
_SPLIT_STREAM = 0x5711
_TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order: sample id i is paths[i]. labels: int64 (n,), places in `classes`, or None without."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: NDArray[np.int64]) -> ImageSet:
        """The images of the given rows, in their order."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageSet(tuple(self.paths[row] for row in rows), labels, self.classes)


def list_images(root: Path) -> ImageSet:
    """All images below `root`, sub-folders included, sorted by their path below it.

    Where every image lies in a sub-folder and there are at least two of these, the first folder of its path is its
    class. Files are taken by their name's extension (EXTENSIONS); names that begin with a dot are left out.
    UserError for a missing folder and for one without an image.
    """
    names = _names(root)
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    paths = tuple(root / name for name in names)
    if len(classes) < 2 or "" in classes:
        return ImageSet(paths, None, ())
    return ImageSet(paths, _labels(folders, classes), classes)


def split(root: Path) -> tuple[ImageSet, ImageSet]:
    """Images to learn from and to test on: `root`/train and `root`/test, or 80 and 20 % of `root` by sample id.

    The labels of both are places in the same `classes`. UserError as `list_images`, or where there are fewer than two.
    """
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = list_images(root / "train"), list_images(root / "test")
        if train.labels is None or test.labels is None or train.classes == test.classes:
            return train, test
        classes = tuple(sorted({*train.classes, *test.classes}))
        return _relabel(train, classes), _relabel(test, classes)
    images = list_images(root)
    if len(images) < 2:
        raise UserError(f"{root} holds one image only; give at least two, to learn from and to test on")
    draw = uniforms(0, 0, np.arange(len(images)), _SPLIT_STREAM, 1)[:, 0]
    held_out = np.argsort(draw, kind="stable")[: max(1, round(_TEST_SHARE * len(images)))]
    is_test = np.zeros(len(images), bool)
    is_test[held_out] = True
    return images.take(np.flatnonzero(~is_test)), images.take(np.flatnonzero(is_test))


def _names(root: Path) -> list[str]:
    """Paths below `root` of its images, sorted, with forward slashes."""
    if not root.exists():
        raise UserError(f"{root} does not exist; give a folder of images")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give a folder of images")
    names, others = [], 0
    for folder, inside, files in _walk(root):
        inside.sort()
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else f"{prefix}/"
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122  (a million names)
                names.append(prefix + name)
            else:
                others += 1
    if names:
        return sorted(names)
    known = ", ".join(sorted(EXTENSIONS))
    if others:
        raise UserError(
            f"{root} holds {others} files, none of them an image by its extension ({known}); give a folder of images"
        )
    raise UserError(f"{root} is empty; give a folder of images ({known})")


def _walk(root: Path) -> list[tuple[str, list[str], list[str]]]:
    """os.walk through links too (folders of links to classes are common), each real folder once."""
    seen: set[tuple[int, int]] = set()
    found = []
    for folder, inside, files in os.walk(root, followlinks=True, onerror=_refuse):
        status = os.stat(folder)  # noqa: PTH116  (os.walk gives strings)
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = [name for name in inside if not name.startswith(".")]
        found.append((folder, inside, files))
    return found


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error


def _labels(folders: list[str], classes: tuple[str, ...]) -> NDArray[np.int64]:
    place = {name: label for label, name in enumerate(classes)}
    return np.array([place[folder] for folder in folders], np.int64)


def _relabel(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    assert images.labels is not None
    return ImageSet(images.paths, _labels([images.classes[label] for label in images.labels], classes), classes)
