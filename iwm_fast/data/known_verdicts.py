"""Verdicts on a process's files: the source's, and those of looking, in memory that does not grow with the list."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.verdicts import PILLOW, UNKNOWN, VERDICT, Verdict, Verdicts
from iwm_fast.data.image_list import ImageSet

__all__ = ["SLOTS", "KnownVerdicts"]

# Of a longer list the verdicts of the last million files of a rank are kept, 26 MB: a rank of many sees other files in
# the next epoch anyway. `iwm-fast data index --check` has all of them.
SLOTS = 1 << 20
_NONE: Verdict = (UNKNOWN, 0, 0, 0, 0)


class KnownVerdicts:
    """Verdicts by file. One that was found here comes before the source's."""

    def __init__(self, images: ImageSet, max_pixels: int) -> None:
        self._images, self._max_pixels = images, max_pixels
        slots = min(len(images), SLOTS)
        self._files = np.full(slots, -1, np.int64)
        self._found: Verdicts = np.zeros(slots, VERDICT)
        self._from_source = images.source.unchecked < len(images.source)

    def __getitem__(self, file: int) -> Verdict:
        slot = file % len(self._files)
        if self._files[slot] == file:
            found: Verdict = self._found[slot].item()
            return found
        known = self._images.verdict(file, self._max_pixels) if self._from_source else None
        return known or _NONE

    def __setitem__(self, file: int, verdict: Verdict) -> None:
        slot = file % len(self._files)
        # In this order another thread that looks meanwhile finds a verdict of its own file, or none.
        self._files[slot] = -1
        self._found[slot] = verdict
        self._files[slot] = file

    def use_pillow(self, file: int) -> None:
        """Note that Pillow has to decode the file."""
        self[file] = (PILLOW, *self[file][1:])

    def unknown(self, files: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the files that have no verdict."""
        return np.array([file for file in files.tolist() if self[file][0] == UNKNOWN], np.int64)
