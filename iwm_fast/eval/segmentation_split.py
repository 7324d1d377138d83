"""Clean images with a class for each pixel, read like the other splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.segmentation import MaskedSet, divide_masked, read_mask
from iwm_fast.data.split_layout import Layout
from iwm_fast.errors import UserError
from iwm_fast.eval.splits import FileSplit, Labels
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.unusable import LeftOut

__all__ = ["MaskedSplit", "open_masked_splits"]


class MaskedSplit:
    """Images and masks that are decoded at each read; pairs with an unusable image or mask are left out."""

    def __init__(
        self, pairs: MaskedSet, config: Config, *, place: str = "images", layout: Layout | None = None
    ) -> None:
        self.pairs, self._config = pairs, config
        self.classes: tuple[str, ...] = ()  # an image has no class of its own
        self._size = config.model.image
        self.label_shape: tuple[int, ...] = (self._size, self._size)
        self._images = FileSplit(pairs.images, self._size, config.data, place=place, layout=layout)

    @property
    def layout(self) -> Layout | None:
        """Which part of the set is which split."""
        return self._images.layout

    @property
    def left_out(self) -> LeftOut:
        """Images and masks that cannot be used."""
        return self._images.left_out

    @property
    def bad(self) -> dict[str, str]:
        """Why each image, or mask, that was left out cannot be used."""
        return self._images.bad

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self) -> Iterator[tuple[Tensor, Labels]]:
        """Images uint8 (b, S, S, 3) and masks uint8 (b, S, S), in the order of the files.

        UserError, at the end, where none or too few pairs can be used.
        """
        used = 0
        for images, rows in self._images.numbered():
            kept, masks = [], []
            for place, row in enumerate(rows):
                mask = self.pairs.masks[row]
                try:
                    masks.append(self._mask(mask, self.pairs.image(row)))
                    kept.append(place)
                except UserError as error:  # of one mask: the limit says how many there may be
                    self.bad[str(mask)] = str(error).removeprefix(f"{mask} ")
            used += len(kept)
            if kept:
                yield images[torch.tensor(kept)], np.stack(masks)
        self._finish(used)

    def accept(self, bad: Mapping[str, str], labels: Labels) -> None:
        """As in the protocol."""
        self.left_out.reasons |= bad
        self._finish(len(labels))

    def spread(self, count: int) -> Tensor:
        """Return images of evenly spread files."""
        return self._images.spread(count)

    def numbered_spread(self, count: int) -> tuple[Tensor, list[int]]:
        """The same, numbered."""
        return self._images.numbered_spread(count)

    def thinned(self, count: int) -> MaskedSplit:
        """A split of at most ``count`` pairs, spread evenly over the sorted files."""
        pairs = self.pairs.take(evenly_spaced(count, len(self)))
        return MaskedSplit(pairs, self._config, place=self._images.place, layout=self.layout)

    def fingerprint(self) -> str:
        """Return a digest of each image's and each mask's path, size and times of change."""
        digest = hashlib.sha256(self._images.fingerprint().encode())
        for path in self.pairs.masks:
            try:
                status = path.stat()
                stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            except OSError:
                stamp = "missing"
            digest.update(f"{path.absolute()} {stamp}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _mask(self, path: Path, image: Path) -> NDArray[np.uint8]:
        """Return classes (S, S); raise UserError if the mask is unusable."""
        if not path.is_file():
            raise UserError(f"{path}: missing; each image of {image.parent} needs a mask of its name")
        return read_mask(path, self._size, image)

    def _finish(self, used: int) -> None:
        """Raise UserError if too many pairs are unusable, or all of them."""
        self.left_out.check()
        self._images.require_some(used)


def open_masked_splits(root: Path, config: Config) -> tuple[MaskedSplit, MaskedSplit]:
    """Return training and test images below ``root``, as ``data.segmentation.divide_masked`` divides them."""
    train, test, layout = divide_masked(root)
    learned, tested = (
        MaskedSplit(pairs, config, place=place, layout=layout)
        for pairs, place in zip((train, test), layout.places, strict=True)
    )
    return learned, tested
