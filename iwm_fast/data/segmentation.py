"""Images with a class per pixel: a folder with ``images/`` and ``masks/``, of the same names.

A mask is a PNG of one channel (gray of 1 to 16 bits, or a palette, whose indices count and not its colours) as large as
the upright image; its values are classes, 255 is no class, and none is larger.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.data.decode.encoded import BadSample, upright_size
from iwm_fast.data.decode.levels import PILLOW_ERRORS, transpose
from iwm_fast.data.image_list import ImageSet, list_images, test_rows
from iwm_fast.data.sources import top_level
from iwm_fast.data.sources.kinds import is_image
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.split_layout import Layout, layout_of_folders
from iwm_fast.errors import UserError

__all__ = ["MaskedSet", "divide_masked", "is_masked", "read_mask", "split_masked"]

_IMAGES, _MASKS = "images", "masks"
_NO_CLASS = 255
_DEPTH_AT = 24  # bits per pixel, in a PNG's first chunk


@dataclass(frozen=True, eq=False)
class MaskedSet:
    """Images in a fixed order, as local files, with the mask file of each."""

    images: ImageSet
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.masks)

    def image(self, row: int) -> Path:
        """Return an image's file."""
        return Path(self.images.name(row))

    def take(self, rows: NDArray[np.int64]) -> MaskedSet:
        """Return the pairs of the given rows, in that order."""
        return MaskedSet(self.images.take(rows), tuple(self.masks[row] for row in rows))


def is_masked(root: Path) -> bool:
    """Return whether a folder holds images with masks, or splits that do."""
    splits = [name for name in top_level(root)[0] if split_kind(name) is not None]
    return any((root / part / _MASKS).is_dir() and (root / part / _IMAGES).is_dir() for part in ("", *splits))


def split_masked(root: Path) -> tuple[MaskedSet, MaskedSet]:
    """Return (training pairs, test pairs), split by `divide_masked`."""
    train, test, _ = divide_masked(root)
    return train, test


def divide_masked(root: Path) -> tuple[MaskedSet, MaskedSet, Layout]:
    """Return (training pairs, test pairs, layout), where `layout` says how they were split.

    The folders of the splits may hold images/ and masks/, or lie in both of them. Raises UserError where a folder is
    missing or empty, the layout is ambiguous, or there are fewer than two images.
    """
    place = str(root)
    layout = layout_of_folders(place, *top_level(root))
    if layout is not None:
        train, test = _pairs(Path(layout.train)), _pairs(Path(layout.test))
        return train, test, _with_lone_masks(layout, train, test)
    pairs = _pairs(root)
    layout = layout_of_folders(f"{place}/{_IMAGES}", top_level(root / _IMAGES)[0])
    if layout is not None:
        top = np.array([pairs.images.source.name(row).split("/", 1)[0] for row in range(len(pairs))])
        train, test = (pairs.take(np.flatnonzero(top == Path(part).name)) for part in layout.places)
    else:
        if len(pairs) < 2:
            raise UserError(f"{root} holds one image only; give at least two, to train on and to test on")
        tested = test_rows(len(pairs))
        layout = Layout(place, place, place, "sample ids")
        train, test = pairs.take(np.flatnonzero(~tested)), pairs.take(np.flatnonzero(tested))
    return train, test, _with_lone_masks(layout, pairs)


def _with_lone_masks(layout: Layout, *sets: MaskedSet) -> Layout:
    """The layout, with masks without an image among what is not used."""
    lone = []
    for pairs in sets:
        folder = Path(pairs.images.source.storage.root).parent / _MASKS
        known = {mask.absolute() for mask in pairs.masks}  # as the storage's root is
        count = sum((folder / name) not in known for name in LocalStorage(folder).names() if is_image(name))
        if count:
            lone.append(f"{count} masks of {folder} without an image")
    return replace(layout, unused=(*layout.unused, *lone))


def read_mask(path: Path, size: int, image: Path) -> NDArray[np.uint8]:
    """Return the classes of the centred largest square, by the nearest pixel: uint8 (size, size), as `load_clean` crops
    ``image``.

    Raises UserError for a file that is no mask, or not as large as the upright image.
    """
    classes = _classes(path)
    height, width = classes.shape
    expected = _upright_size(image)
    if (width, height) != expected:
        raise UserError(
            f"{path} is {width} × {height} pixels, its image {expected[0]} × {expected[1]}: make them the same"
        )
    side = min(width, height)
    cells = ((2 * np.arange(size) + 1) * side) // (2 * size)  # the centre of each of size × size cells
    return classes[np.ix_((height - side) // 2 + cells, (width - side) // 2 + cells)]


def _classes(path: Path) -> NDArray[np.uint8]:
    """The values that a mask stores, upright: uint8 (height, width)."""
    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as file:
            kind, mode = file.format, file.mode
            file.load()
            numbers = np.asarray(transpose(file))
    except PILLOW_ERRORS as error:
        raise UserError(
            f"{path} cannot be decoded as a mask: {error}; replace it, or remove it and its image"
        ) from error
    if kind != "PNG":
        raise UserError(f"{path} is a {kind} file; a mask is a PNG, which keeps the numbers of classes as they are")
    if mode not in ("L", "P", "1") and not mode.startswith("I"):
        raise UserError(f"{path} has mode {mode}; a mask is a PNG of one channel, the numbers of classes")
    depth = raw[_DEPTH_AT]
    if mode == "L" and depth < 8:
        numbers = numbers // (255 // (2**depth - 1))  # Pillow scales gray of 2 and 4 bits to full range
    if numbers.max() > _NO_CLASS:
        raise UserError(
            f"{path} has class number {numbers.max()}; classes go from 0 to {_NO_CLASS - 1}, {_NO_CLASS} is no class"
        )
    return numbers.astype(np.uint8)


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height after the EXIF orientation; only the header is decoded."""
    try:
        return upright_size(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except BadSample as bad:
        raise UserError(f"{path}: {bad.reason}; replace it, or remove it and its mask") from bad


def _pairs(root: Path) -> MaskedSet:
    if not (root / _IMAGES).is_dir() or not (root / _MASKS).is_dir():
        raise UserError(f"{root} has no {_IMAGES}/ and {_MASKS}/ beside each other; segmentation needs both")
    images = list_images(root / _IMAGES, "folder")
    names = (images.source.name(number) for number in range(len(images)))
    return MaskedSet(images, tuple((root / _MASKS / name).with_suffix(".png") for name in names))
