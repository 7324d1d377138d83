"""What is known of a file without looking at it again: that DALI decodes it as it is, that Pillow has to, or nothing.

A verdict is about bytes: whoever uses one makes sure that the file is still the one that was checked. A file that is
bad has none, so that its reason is always found, and worded, where the file is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.encoded import BadSample, Encoded, as_it_is

__all__ = ["PILLOW", "PLAIN", "RULES", "UNKNOWN", "VERDICT", "Verdict", "Verdicts", "verdict_of", "verdict_on"]

# The number of the rules by which files are checked (`encoded`, `structure`): one more when a verdict may be another.
RULES = 1

UNKNOWN, PLAIN, PILLOW = range(3)

# state: one of the above. orientation: EXIF's number. width, height: of the upright image. length: bytes of the file.
# The last four are a plain file's.
VERDICT = np.dtype([("state", "u1"), ("orientation", "u1"), ("width", "<i4"), ("height", "<i4"), ("length", "<i8")])
Verdicts = NDArray[Any]  # of VERDICT, one a file
Verdict = tuple[int, int, int, int, int]


def verdict_of(encoded: Encoded, length: int) -> Verdict:
    """The verdict that `encoded`, made of a file of `length` bytes, stands for; an item of VERDICT."""
    if encoded.lossless:
        return PILLOW, 1, 0, 0, length
    return PLAIN, encoded.orientation, encoded.width, encoded.height, length


def verdict_on(raw: bytes, max_pixels: int) -> Verdict:
    """The verdict on a file's bytes, which are not decoded: Pillow may still find that it cannot."""
    try:
        encoded = as_it_is(raw, max_pixels)
    except BadSample:
        return UNKNOWN, 0, 0, 0, 0
    return (PILLOW, 1, 0, 0, len(raw)) if encoded is None else verdict_of(encoded, len(raw))
