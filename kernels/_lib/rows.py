"""How kernels iterate over the rows of a tensor: strides, block sizes, and rows per program.

A kernel that holds a whole row splits it into PARTS pieces of BLOCK_D, so that a width that is not a power of two
wastes no lanes (384 is 3 × 128) and each element is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import triton
from torch import Tensor

from .backend import without_autocast

__all__ = [
    "SUM_PROGRAMS",
    "launching",
    "pieces",
    "rows_a_program",
    "rows_a_sum",
    "rows_in_warps",
    "rows_together",
]

# Most programs that also sum over rows. Each writes a row of sums, which a second stage reads: at 50,176 rows 4 % of
# the bytes of LayerNorm's backward pass; one program per four rows of 384 would move half as many bytes again.
SUM_PROGRAMS = 1024
# Values that a program of a row kernel holds: 4 warps with 64 registers per lane. More of them spill.
_HELD = 4 * 32 * 64

_WARPS = 4
# Values of a row per lane, by element size, if a warp holds the row whole beside two sums per value. More of them
# spill.
_WARP_HELD = {2: 40, 4: 32}


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """Enter the device of `x`, whichever is current, and disable autocast."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), without_autocast(x):
        yield


def rows_together(x: Tensor) -> Tensor:
    """Return `x` (N, D) or (D,), or a copy, with contiguous rows: the layout that kernels read, except for weights.

    A single row gets the stride that several rows would have. A view's stride may be anything, and Triton would compile
    a variant for it.
    """
    x = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    if x.dim() == 2 and x.shape[0] == 1 and x.stride() != (x.shape[1], 1):
        return x.as_strided(x.shape, (x.shape[1], 1))
    return x


def pieces(width: int) -> tuple[int, int]:
    """Return (BLOCK_D, PARTS) that cover a row with the fewest idle lanes: 384 is 3 × 128, 768 is 3 × 256."""
    whole = triton.next_power_of_2(width)
    for parts in (1, 3, 5, 7):
        block = max(16, triton.next_power_of_2(triton.cdiv(width, parts)))
        if block * parts < whole:
            return block, parts
    return max(16, whole), 1


def rows_a_program(width: int, copies: int) -> int:
    """Return the rows that a row kernel holds at once, with `copies` values per element of a row."""
    return max(1, min(16, _HELD // (copies * triton.next_power_of_2(width))))


def rows_in_warps(width: int, element: int) -> tuple[int, int, int, int]:
    """Return (BLOCK_N, BLOCK_D, PARTS, warps) of a kernel that holds rows, and sums of their columns beside them.

    A warp holds whole rows, in pieces of 16 bytes per lane, so that no sum over a row waits for another warp. Rows
    wider than a warp's registers are spread over several warps, one row per program.
    """
    lane, held = 16 // element, _WARP_HELD[element]
    sizes = [32 * lane >> shift for shift in range(3)]
    if width % 16:  # 16-byte loads are impossible
        sizes = [max(sizes[-1], min(sizes[0], triton.next_power_of_2(width)))]
    block_d = min(sizes, key=lambda size: triton.cdiv(width, size) * size)
    parts = triton.cdiv(width, block_d)
    if parts * lane <= held:
        return _WARPS * 32 * lane // block_d, block_d, parts, _WARPS
    block_d, parts = pieces(width)
    return 1, block_d, parts, min(16, max(_WARPS, triton.next_power_of_2(triton.cdiv(width, 16 * held))))


def rows_a_sum(rows: int, block_n: int) -> int:
    """Return the rows that one program sums beside its other work: a multiple of block_n that keeps programs few."""
    return block_n * triton.cdiv(triton.cdiv(rows, block_n), SUM_PROGRAMS)
