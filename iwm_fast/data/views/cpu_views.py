"""Render the two views on the CPU from what DALI decoded, one image at a time on threads.

DALI decodes; `cpu_operators` does the rest, because most of DALI's time on the CPU went into operators that round each
float by itself and into copies between operators. One thread renders each image from the decoded region to the last
operator, into the returned tensor, while DALI decodes the next batch.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.transforms import CORRUPTIONS
from iwm_fast.data.views.cpu_operators import CORRUPT, recolour, resize

__all__ = ["CpuViews", "Rendering"]

Levels = NDArray[np.uint8]
Inputs = Mapping[str, Any]  # by name as in `view_inputs.view_inputs`; a list each, one item per sample

# Pieces of a batch per thread: enough that none waits long for the last.
_PIECES = 4


@dataclass(frozen=True, eq=False)
class Rendering:
    """A batch in progress: uint8 (B, S, S, 3) target and base, (B · K, S, S, 3) source and source_base; without bases
    the last two are (0, S, S, 3).
    """

    target: Tensor
    base: Tensor
    source: Tensor
    source_base: Tensor
    pieces: tuple[Future[None], ...]

    def wait(self) -> None:
        """Wait until all of it is rendered."""
        for piece in self.pieces:
            piece.result()


class CpuViews:
    """Renders batches of views of `size` × `size` pixels on `threads` threads; the rest as in `ViewGraph`."""

    def __init__(self, size: int, threads: int, *, geometric: bool, sources: int, bases: bool) -> None:
        self._size, self._threads, self._geometric, self._bases = size, threads, geometric, bases
        self._sources = [f"source{k}" for k in range(sources)]
        self._memory = _Memory()
        self._pool = _pool(threads)

    def start(self, regions: Sequence[Tensor], inputs: Inputs) -> Rendering:
        """Start a batch. regions: B decoded images, uint8 (h, w, 3); inputs: the batch's `view_inputs`."""
        count, side = len(regions), self._size
        target = self._memory.take(count, side, side, 3)
        source = self._memory.take(count * len(self._sources), side, side, 3)
        base = self._memory.take(count if self._bases else 0, side, side, 3)
        own = self._memory.take(*source.shape) if self._geometric and self._bases else base
        arrays = [tensor.numpy() for tensor in (target, base, source, own)]
        # indexing a list takes a third of the time of indexing an array
        inputs = {name: list(value) if name.endswith("_matrix") else _listed(value) for name, value in inputs.items()}
        length = -(-count // (_PIECES * self._threads))
        pieces = tuple(
            self._pool.submit(self._piece, regions, inputs, range(first, min(first + length, count)), arrays)
            for first in range(0, count, length)
        )
        return Rendering(target, base, source, own, pieces)

    def close(self) -> None:
        """End the threads; batches that have not begun are not rendered."""
        self._pool.shutdown(cancel_futures=True)

    def _piece(self, regions: Sequence[Tensor], inputs: Inputs, rows: range, arrays: list[Levels]) -> None:
        target, base, source, own = arrays
        for row in rows:
            image = self._placed(regions[row], inputs, "target", row)
            if self._bases:
                base[row] = image
            _jitter(image, inputs, "target", row, target[row])
            for k, name in enumerate(self._sources):
                at = row * len(self._sources) + k
                if self._geometric:
                    image = self._placed(regions[row], inputs, name, row)
                    if self._bases:
                        own[at] = image
                _destroy(image, inputs, name, row, source[at])

    def _placed(self, region: Tensor, inputs: Inputs, view: str, row: int) -> Levels:
        """The view's own box of the decoded region, resized, mirrored and, where the sample needs it, transposed."""
        if self._geometric:
            (x, y), (width, height) = inputs[f"{view}_start"][row], inputs[f"{view}_shape"][row]
            region = region[y : y + height, x : x + width]
        down, across = map(bool, inputs[f"{view}_roi_start"][row])
        made = resize(region, self._size, down=down, across=across)
        return (made.transpose(0, 1) if inputs[f"{view}_transposed"][row] else made).contiguous().numpy()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose operators stay on one core each: images already run in parallel, and a team of threads per small
    matmul takes longer than the matmul. The number that other threads use stays as it is.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "iwm-fast pixels", initializer=_one_core)
    begun = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(begun.wait)
    begun.wait()
    torch.set_num_threads(before)  # the number that threads started later inherit
    return pool


def _one_core() -> None:
    torch.get_num_threads()  # a thread's first query adopts the process's number, so it comes first
    torch.set_num_threads(1)


def _listed(value: Any) -> list[Any]:
    listed: list[Any] = value.tolist() if isinstance(value, np.ndarray) else value
    return listed


class _Memory:
    """Output memory, reused when nobody holds a tensor of it: getting fresh pages takes longer than copying an image
    into them.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []

    def take(self, *shape: int) -> Tensor:
        """Return a uint8 tensor of that shape, uninitialised."""
        count = math.prod(shape)
        held = zip(self._blocks, _references(self._blocks), strict=True)
        block = next((block for block, references in held if len(block) >= count and references == _UNUSED), None)
        if block is None:
            block = torch.empty(count, dtype=torch.uint8).numpy()
            self._blocks.append(block)
        return torch.from_numpy(block)[:count].view(shape)


def _references(blocks: list[NDArray[np.uint8]]) -> list[int]:
    """Return each one's references, those of the count itself included, which differ among versions of Python."""
    return [sys.getrefcount(block) for block in blocks]


_UNUSED = _references([np.empty(1, np.uint8)])[0]  # what the list alone holds


def _jitter(image: Levels, inputs: Inputs, view: str, row: int, out: Levels) -> None:
    """The jittered image in `out`, or a copy where there is no jitter."""
    if inputs[f"{view}_jittered"][row]:
        recolour(image, inputs[f"{view}_matrix"][row], out)
    else:
        out[:] = image


def _destroy(image: Levels, inputs: Inputs, source: str, row: int, out: Levels) -> None:
    """Jitter and the corruptions in order, each only where the sample has it."""
    _jitter(image, inputs, source, row, out)
    for corruption in CORRUPTIONS:
        flags = inputs.get(f"{source}_{corruption.name}")
        if flags is not None and flags[row]:
            strength = inputs[f"{source}_{corruption.strength}"][row] if corruption.strength is not None else None
            CORRUPT[corruption.name](out, strength)
