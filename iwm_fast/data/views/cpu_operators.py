"""Image operators for the CPU, where DALI's are scalar code: resize, jitter, blur, and the rest.

The arithmetic is PyTorch's and NumPy's vectorised loops, which release Python's lock. Levels are uint8 (h, w, 3) and
contiguous; every operator rounds to levels once. On a GPU the graph uses DALI's operators; tests compare both with one
reference. benchmarks/NOTES.md has their times.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from iwm_fast.actions.transforms import Jitter, colour_matrix

__all__ = ["CORRUPT", "blur", "compress", "grayscale", "recolour", "recolour_matrices", "resize", "solarize"]

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Adjacent pixels in a row of a matmul: one of (n, 24) and (24, 24) runs at the machine's rate, one of (n, 3) and (3, 3)
# takes five times as long with an eighth of the multiplications.
_TOGETHER = 8
# Rows per blur matmul: with fewer the taps are loaded more often, with more most multiplications are by zero.
_ROWS = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class _Scratch(threading.local):
    """Float memory that a thread reuses: fresh pages take as long as the arithmetic on them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return float32 of that shape, uninitialised."""
        count = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = torch.empty(count)
        return buffer[:count].view(shape)


_scratch = _Scratch()


def resize(image: Tensor, size: int, *, down: bool = False, across: bool = False) -> Tensor:
    """Resize (h, w, 3) to (size, size, 3), uint8: linear interpolation, antialiased, rounded after each direction.

    down, across: mirrored upside down, left to right.
    """
    planes = image[None].permute(0, 3, 1, 2)  # channels stay last in memory, which the fast loop needs
    out = functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    mirrored = [axis for axis, turn in ((2, down), (3, across)) if turn]
    return (out.flip(mirrored) if mirrored else out)[0].permute(1, 2, 0)


def recolour_matrices(jitter: Jitter) -> Floats:
    """Return `colour_matrix` in the layout of `recolour`: float32 (B, 25, 24).

    The first 24 rows map eight adjacent pixels at once, the last is the offset, with the half that turns truncation
    into rounding.
    """
    matrix = colour_matrix(jitter)
    return _blocks(matrix[:, :, :3], matrix[:, :, 3])


def _blocks(matrix: NDArray[np.floating], offset: NDArray[np.floating]) -> Floats:
    """(B, 3, 3) and (B, 3) for eight pixels at once: float32 (B, 25, 24)."""
    width = 3 * _TOGETHER
    blocks = np.zeros((len(matrix), width + 1, width), np.float32)
    for pixel in range(_TOGETHER):
        own = slice(3 * pixel, 3 * pixel + 3)
        blocks[:, own, own] = matrix.transpose(0, 2, 1)
        blocks[:, -1, own] = offset + 0.5
    return blocks


_GRAY = _blocks(np.tile(_LUMA, (1, 3, 1)), np.zeros((1, 3)))[0]


def recolour(image: Levels, matrix: Floats, out: Levels | None = None) -> Levels:
    """Apply the affine colour map to each pixel of (h, w, 3), rounded and clipped once; matrix: (25, 24).

    out: the result, may be the image itself; the same for the operators below.
    """
    out = np.empty_like(image) if out is None else out
    rows = -(-image.size // matrix.shape[1])
    pixels, mapped = (_scratch(name, rows, matrix.shape[1]) for name in ("pixels", "mapped"))
    levels = pixels.view(-1)
    levels[: image.size].copy_(torch.from_numpy(image).view(-1))
    levels[image.size :].zero_()
    blocks = torch.from_numpy(matrix)
    torch.addmm(blocks[-1], pixels, blocks[:-1], out=mapped)
    mapped.clamp_(0, 255.5)
    # NumPy's cast is four times as fast as PyTorch's here
    np.copyto(out.reshape(-1), mapped.numpy().reshape(-1)[: image.size], casting="unsafe")
    return out


def grayscale(image: Levels, out: Levels | None = None) -> Levels:
    """Luma (.299, .587, .114) in all three channels."""
    return recolour(image, _GRAY, out)


def solarize(image: Levels, threshold: int) -> None:
    """In place: 255 - v where v ≥ threshold; for uint8, v with all its bits turned."""
    np.bitwise_xor(image, np.negative((image >= threshold).view(np.uint8)), out=image)


def blur(image: Levels, sigma: float, out: Levels | None = None) -> Levels:
    """Gaussian of 2·⌈3σ⌉ + 1 taps each way, edges mirrored without repeating the outermost pixel.

    Each direction is a product with a band of taps: down, `_ROWS` rows at a time; then across, eight pixels at a time.
    """
    out = np.empty_like(image) if out is None else out
    (height, width), radius = image.shape[:2], int(np.ceil(3 * sigma))
    bands, groups = -(-height // _ROWS), -(-width // _TOGETHER)
    rows, columns = bands * _ROWS + 2 * radius, groups * _TOGETHER + 2 * radius
    down, across = _bands(float(sigma), radius)
    padded = _scratch("pixels", rows, 3 * columns)
    _mirrored(image, radius, padded.view(rows, columns, 3))
    windows = padded.as_strided((bands, _ROWS + 2 * radius, 3 * columns), (_ROWS * 3 * columns, 3 * columns, 1))
    half = _scratch("half", bands, _ROWS, 3 * columns)
    torch.bmm(down.expand(bands, -1, -1), windows, out=half)
    windows = half.as_strided((groups, height, len(across)), (3 * _TOGETHER, 3 * columns, 1))
    done = _scratch("mapped", groups, height, 3 * _TOGETHER)
    torch.bmm(windows, across.expand(groups, -1, -1), out=done)
    # floats to levels, and the groups side by side again; the taps are positive and their sum is 1: nothing to clip
    wide = done.numpy().transpose(1, 0, 2)
    if width % _TOGETHER == 0:
        np.copyto(out.reshape(height, groups, 3 * _TOGETHER), wide, casting="unsafe")
    else:
        out[:] = wide.astype(np.uint8).reshape(height, -1, 3)[:, :width]
    return out


def _mirrored(image: Levels, radius: int, into: Tensor) -> None:
    """The image and a mirrored margin, as floats with the half that turns cutting off into rounding; the rest is 0."""
    height, width = image.shape[:2]
    floats, tall = into.numpy(), height + 2 * radius
    floats[tall:] = 0
    floats[:, width + 2 * radius :] = 0
    inner = floats[:tall, radius : radius + width]
    np.add(np.take(image, _reflected(height, radius), axis=0), np.float32(0.5), out=inner)
    at = _reflected(width, radius)
    floats[:tall, :radius] = inner[:, at[:radius]]
    floats[:tall, radius + width : width + 2 * radius] = inner[:, at[radius + width :]]


@lru_cache(maxsize=64)
def _reflected(length: int, radius: int) -> NDArray[np.int64]:
    """Where each pixel of a line with its margins comes from."""
    return np.pad(np.arange(length), radius, mode="reflect")


def _bands(sigma: float, radius: int) -> tuple[Tensor, Tensor]:
    """Down (_ROWS, _ROWS + 2 · radius), and across ((8 + 2 · radius) · 3, 24), in which channels do not mix."""
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    down = np.zeros((_ROWS, _ROWS + 2 * radius), np.float32)
    across = np.zeros((_TOGETHER + 2 * radius, 3, _TOGETHER, 3), np.float32)
    for row in range(_ROWS):
        down[row, row : row + len(taps)] = taps
    for pixel in range(_TOGETHER):
        for channel in range(3):
            across[pixel : pixel + len(taps), channel, pixel, channel] = taps
    return torch.from_numpy(down), torch.from_numpy(across.reshape(-1, 3 * _TOGETHER))


def compress(image: Levels, quality: int) -> None:
    """In place: to a JPEG of that quality, chroma of half the resolution each way, and back."""
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        with Image.open(file, formats=["JPEG"]) as decoded:
            image[:] = np.asarray(decoded)


# By the name of the corruption: in place, with how strong it is (None where it has no strength).
CORRUPT: dict[str, Callable[[Levels, Any], object]] = {
    "grayscale": lambda image, _: grayscale(image, image),
    "blur": lambda image, sigma: blur(image, sigma, image),
    "solarize": solarize,
    "compression": compress,
}
