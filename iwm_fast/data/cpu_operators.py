"""Two operators of the graph on the CPU, resize and jitter, where DALI's own are scalar code.

DALI calls them from its graph (`fn.python_function`) with the samples that need them, as NumPy arrays that share DALI's
memory. The arithmetic is PyTorch's and NumPy's vectorised loops, which let go of Python's lock, so several samples are
worked on at a time. On a GPU the graph uses DALI's operators; both answer to one reference in tests.

Measured at 224² from 500 × 375 JPEGs, milliseconds of a core an image (benchmarks/NOTES.md): resize 1.1 to 0.3, a
jitter 1.2 to 0.2. Most of DALI's time in a jitter goes into rounding each float to a level by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from iwm_fast.actions import Jitter, colour_matrix

__all__ = ["CpuOperators", "recolour", "recolour_matrices", "resize"]

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Pixels side by side in a row of the matrix product: a product of (n, 24) and (24, 24) runs at the machine's rate, one
# of (n, 3) and (3, 3) takes five times as long though it multiplies an eighth as often.
_TOGETHER = 8


class CpuOperators:
    """The operators over batches, on `threads` threads of their own (none where it is 1); size: of what `resize` makes.

    DALI must be given the methods as they are: what is called while it reads a pipeline's definition is rewritten by
    its AutoGraph, and then runs many times slower.
    """

    def __init__(self, size: int, threads: int) -> None:
        self._size = size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="iwm-fast pixels") if threads > 1 else None

    def resize(self, images: Sequence[Levels], starts: Sequence[Floats], ends: Sequence[Floats]) -> list[Levels]:
        """A batch of `resize`."""
        return self._each(lambda image, start, end: resize(image, start, end, self._size), images, starts, ends)

    def recolour(self, images: Sequence[Levels], matrices: Sequence[Floats]) -> list[Levels]:
        """A batch of `recolour`."""
        return self._each(recolour, images, matrices)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _each(self, function: Callable[..., Levels], *batches: Sequence[Any]) -> list[Levels]:
        return list(self._pool.map(function, *batches) if self._pool else map(function, *batches))


def resize(image: Levels, start: Floats, end: Floats, size: int) -> Levels:
    """(h, w, 3) to (size, size, 3): linear interpolation, antialiased, rounded to levels after each direction.

    start and end: (2,), height then width: 0 and 1, or 1 and 0 where the image is mirrored along that side.
    """
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels stay last in memory, as the fast loop wants
    out = functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    mirrored = [axis + 2 for axis in range(2) if start[axis] > end[axis]]
    if mirrored:
        out = out.flip(mirrored)
    levels: Levels = out[0].permute(1, 2, 0).numpy()
    return levels


def recolour_matrices(jitter: Jitter) -> Floats:
    """`colour_matrix` as `recolour` takes it: float32 (B, 25, 24).

    The first 24 rows map eight neighbouring pixels at once, the last is what is added to them, with the half that turns
    cutting off into rounding.
    """
    matrix, width = colour_matrix(jitter), 3 * _TOGETHER
    blocks = np.zeros((len(matrix), width + 1, width), np.float32)
    for pixel in range(_TOGETHER):
        own = slice(3 * pixel, 3 * pixel + 3)
        blocks[:, own, own] = matrix[:, :, :3].transpose(0, 2, 1)
        blocks[:, -1, own] = matrix[:, :, 3] + 0.5
    return blocks


def recolour(image: Levels, matrix: Floats) -> Levels:
    """The affine map of colour of each pixel of (h, w, 3), rounded and clipped once; matrix: (25, 24)."""
    levels = image.reshape(-1)
    odd = -levels.size % matrix.shape[1]
    if odd:
        levels = np.concatenate([levels, np.zeros(odd, np.uint8)])
    pixels = torch.from_numpy(levels).view(-1, matrix.shape[1]).float()
    blocks = torch.from_numpy(matrix)
    mapped = torch.addmm(blocks[-1], pixels, blocks[:-1], out=torch.empty_like(pixels)).clamp_(0, 255.5)
    # NumPy's cast is seven times as fast as PyTorch's here
    return mapped.numpy().astype(np.uint8).reshape(-1)[: image.size].reshape(image.shape)
