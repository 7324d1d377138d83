"""How kernels walk over the rows of a tensor: strides that they take, blocks, and the rows of a program.

Where a row is held whole, it is in PARTS pieces of BLOCK_D, so that a width that is no power of two wastes no lanes
(384 is 3 × 128) and each number is read once.
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

# Most programs that sum rows beside other work. Each writes a row of sums, which a second stage reads: at 50,176 rows
# 4 % of the bytes of LN's backward pass, where a program for every four rows of 384 would move half as many again.
SUM_PROGRAMS = 1024
# Values a program of a row kernel holds: 4 warps with 64 registers of them a lane. More spills.
_HELD = 4 * 32 * 64

_WARPS = 4
# Most values of a row a lane, by their bytes, where a warp holds it whole beside two sums for each: more spills.
_WARP_HELD = {2: 40, 4: 32}


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """What an operator runs in: the device of `x`, whichever is the current one, and autocast off."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), without_autocast(x):
        yield


def rows_together(x: Tensor) -> Tensor:
    """`x` (N, D) or (D,), or a copy of it, with each row in one piece: how kernels read all but weights.

    A single row gets the stride that more rows would have: as a view's it may be anything, and Triton would compile
    for it.
    """
    x = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    if x.dim() == 2 and x.shape[0] == 1 and x.stride() != (x.shape[1], 1):
        return x.as_strided(x.shape, (x.shape[1], 1))
    return x


def pieces(width: int) -> tuple[int, int]:
    """(BLOCK_D, PARTS) that cover a row with the fewest idle lanes: 384 is 3 × 128, 768 is 3 × 256."""
    whole = triton.next_power_of_2(width)
    for parts in (1, 3, 5, 7):
        block = max(16, triton.next_power_of_2(triton.cdiv(width, parts)))
        if block * parts < whole:
            return block, parts
    return max(16, whole), 1


def rows_a_program(width: int, copies: int) -> int:
    """Rows that a row kernel holds at once, with so many values for each number of a row."""
    return max(1, min(16, _HELD // (copies * triton.next_power_of_2(width))))


def rows_in_warps(width: int, element: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_D, PARTS, warps) of a kernel that holds rows with sums of their columns beside them.

    A warp holds whole rows, in pieces of 16 bytes a lane, so that no sum over a row waits for another warp. Wider rows
    than its registers take are spread over more warps, one row a program.
    """
    lane, held = 16 // element, _WARP_HELD[element]
    sizes = [32 * lane >> shift for shift in range(3)]
    if width % 16:  # no load of 16 bytes to be had
        sizes = [max(sizes[-1], min(sizes[0], triton.next_power_of_2(width)))]
    block_d = min(sizes, key=lambda size: triton.cdiv(width, size) * size)
    parts = triton.cdiv(width, block_d)
    if parts * lane <= held:
        return _WARPS * 32 * lane // block_d, block_d, parts, _WARPS
    block_d, parts = pieces(width)
    return 1, block_d, parts, min(16, max(_WARPS, triton.next_power_of_2(triton.cdiv(width, 16 * held))))


def rows_a_sum(rows: int, block_n: int) -> int:
    """Rows that a program sums beside other work, a multiple of block_n, so that there are few programs."""
    return block_n * triton.cdiv(triton.cdiv(rows, block_n), SUM_PROGRAMS)
