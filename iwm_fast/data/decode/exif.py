"""Map crops, flips and quarter turns of an upright image to the coordinates of the stored pixels.

EXIF says how to turn stored pixels upright. Instead of turning them, the crop box is mapped to the stored image, and
EXIF's turn is combined with the view's own flip and rotation: a mirroring along the two sides, then perhaps a
transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.transforms import Geometry

__all__ = ["Placement", "place"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# By EXIF's number from 1: stored, mirrored across and down, then transposed, is upright.
_ACROSS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1], bool)
_DOWN = np.array([0, 0, 0, 1, 1, 0, 1, 1, 0], bool)
_TRANSPOSED = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1], bool)


@dataclass(frozen=True, eq=False)
class Placement:
    """How to make B views from stored images: crop `box`, resize, mirror, transpose.

    box: int64 (B, 4), x, y, width, height in the stored image; down, across: bool (B,), mirrored upside down, left to
    right; transposed: bool (B,), after that.
    """

    box: Ints
    down: Bools
    across: Bools
    transposed: Bools


def place(geometry: Geometry, size: Ints, orientation: Sequence[int]) -> Placement:
    """Return the placement of views of B upright images.

    size: int64 (B, 2), width and height of the upright image; orientation: B numbers from 1 to 8, EXIF's, 1 for a file
    that is stored upright.
    """
    turn = np.asarray(orientation, np.int64)
    across, down, transposed = _ACROSS[turn], _DOWN[turn], _TRANSPOSED[turn]
    stored = np.where(transposed[:, None], size[:, ::-1], size)
    box = np.where(transposed[:, None], geometry.crop[:, [1, 0, 3, 2]], geometry.crop)
    corner = np.stack(
        [
            np.where(across, stored[:, 0] - box[:, 0] - box[:, 2], box[:, 0]),
            np.where(down, stored[:, 1] - box[:, 1] - box[:, 3], box[:, 1]),
        ],
        axis=1,
    )
    # A flip, then k counter-clockwise quarter turns, equals these mirrorings and then, for odd k, a transpose.
    view_across = geometry.flip ^ np.isin(geometry.rotation, (1, 2))
    view_down = np.isin(geometry.rotation, (2, 3))
    return Placement(
        box=np.concatenate([corner, box[:, 2:]], axis=1),
        # after a transpose, across is down
        down=down ^ np.where(transposed, view_across, view_down),
        across=across ^ np.where(transposed, view_down, view_across),
        transposed=transposed ^ (geometry.rotation % 2 == 1),
    )
