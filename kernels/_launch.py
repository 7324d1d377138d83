"""The kernels of `_norms` and `_rows` as functions on tensors: grids and strides.

All tensors are of one device. Rows lie in one piece each (`rows_together`). Nothing here allocates more than it
returns, but for partial sums. Every reduction is in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import triton
from torch import Tensor

from ._backend import without_autocast
from ._norms import norm_backward_kernel, norm_kernel
from ._rows import (
    action_grad_kernel,
    action_weight_grad_kernel,
    add_slices_kernel,
    image_kernel,
    segment_sum_kernel,
)

__all__ = [
    "action_gradients",
    "add_gradients",
    "add_pairs",
    "add_slices",
    "column_sums",
    "image_of_rows",
    "launching",
    "norm_backward",
    "normalise",
    "pieces",
    "rows_a_program",
    "rows_a_sum",
    "rows_in_warps",
    "rows_together",
    "segment_sums",
]

# Fewest rows that a program sums of a column.
_SUM_ROWS = 256
# Most programs that sum rows beside other work. Each writes a row of sums, which a second stage reads: at 50,176 rows
# 4 % of the bytes of LN's backward pass, where a program for every four rows of 384 would move half as many again.
_SUM_PROGRAMS = 1024
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
    return block_n * triton.cdiv(triton.cdiv(rows, block_n), _SUM_PROGRAMS)


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, branch: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """LN(x) (N, D) of x's type, or LN(x + branch), that sum then written to `total` (N, D)."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block_n, block_d, parts, warps = rows_in_warps(width, x.element_size())
    norm_kernel[(triton.cdiv(rows, block_n),)](
        x_ptr=x, branch_ptr=branch, weight_ptr=weight, bias_ptr=bias, total_ptr=total, out_ptr=out,
        N=rows, D=width,
        stride_xn=x.stride(0), stride_bn=0 if branch is None else branch.stride(0),
        stride_tn=0 if total is None else total.stride(0), stride_on=out.stride(0),
        eps=eps,
        HAS_BRANCH=branch is not None,
        BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=warps,
    )  # fmt: skip
    return out


def norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None, dx: Tensor, eps: float
) -> Tensor:
    """Write LN's gradient, plus `residual`, to dx (N, D), and return parts of those of weight and bias.

    They are fp32 (programs, 2, D), to be added by `add_slices`.
    """
    rows, width = x.shape
    block_n, block_d, parts, warps = rows_in_warps(width, x.element_size())
    depth = rows_a_sum(rows, block_n)
    programs = triton.cdiv(rows, depth)
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    norm_backward_kernel[(programs,)](
        dnormed_ptr=dnormed, x_ptr=x, weight_ptr=weight, residual_ptr=residual, dx_ptr=dx, sums_ptr=sums,
        N=rows, D=width, ROWS=depth,
        stride_gn=dnormed.stride(0), stride_xn=x.stride(0), stride_rn=0 if residual is None else residual.stride(0),
        stride_dn=dx.stride(0),
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=warps,
    )  # fmt: skip
    return sums


def add_slices(slices: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """Σ of fp32 slices (S, ...) in their order, rounded once to `dtype`: (...).

    into: fp32 (...), contiguous, the sum's first term; it is overwritten with the sum and returned.
    """
    if into is not None:
        assert dtype == into.dtype == torch.float32
        _add_slices(slices, into, None, accumulate=True)
        return into
    out = torch.empty(slices.shape[1:], dtype=dtype, device=slices.device)
    _add_slices(slices, out, None)
    return out


def add_pairs(slices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of slices (S, 2, D), as two tensors (D,)."""
    first, second = (torch.empty(slices.shape[2], dtype=dtype, device=slices.device) for _ in range(2))
    _add_slices(slices, first, second)
    return first, second


def add_gradients(slices: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The same of slices (S, P · Q [+ P]), as tensors like weight (P, Q) and bias (P,)."""
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    _add_slices(slices, dweight, dbias)
    return dweight, dbias


def _add_slices(slices: Tensor, out: Tensor, second: Tensor | None, *, accumulate: bool = False) -> None:
    length = out.numel() + (0 if second is None else second.numel())
    if length:
        add_slices_kernel[(triton.cdiv(length, 1024),)](
            slices_ptr=slices, out_ptr=out, second_ptr=second, SLICES=slices.shape[0], L=length, SPLIT=out.numel(),
            HAS_SECOND=second is not None, ACCUMULATE=accumulate, BLOCK=1024, num_warps=4,
        )  # fmt: skip


def image_of_rows(rows: int, cu_seqlens: Tensor) -> Tensor:
    """The image of each of `rows` rows, int32 (N,), of its bounds int32 (B + 1,)."""
    image = torch.empty(rows, dtype=torch.int32, device=cu_seqlens.device)
    if rows:
        image_kernel[(len(cu_seqlens) - 1,)](
            cu_seqlens_ptr=cu_seqlens, image_ptr=image, N=rows, BLOCK=256, num_warps=4
        )  # fmt: skip
    return image


def segment_sums(x: Tensor, bounds: Tensor, first: int, out: Tensor, *, accumulate: bool) -> None:
    """Put into fp32 out (segments, M), or add, the sum of x's rows (N, M) of each segment.

    bounds: int32 (segments + 1,), of rows of which x's first is number `first`.
    """
    _segment_sums(x, bounds, first, 0, out, accumulate=accumulate)


def column_sums(x: Tensor) -> Tensor:
    """Parts of the sum of x's rows (N, M), fp32 (programs, M), to be added by `add_slices`."""
    rows = max(1, x.shape[0])
    depth = _SUM_ROWS * triton.cdiv(triton.cdiv(rows, _SUM_ROWS), _SUM_PROGRAMS)
    out = torch.empty(triton.cdiv(rows, depth), x.shape[1], dtype=torch.float32, device=x.device)
    _segment_sums(x, None, 0, depth, out, accumulate=False)
    return out


def _segment_sums(x: Tensor, bounds: Tensor | None, first: int, depth: int, out: Tensor, *, accumulate: bool) -> None:
    rows, width = x.shape
    block_m = min(128, max(16, triton.next_power_of_2(width)))
    segment_sum_kernel[(out.shape[0], triton.cdiv(width, block_m))](
        x_ptr=x, bounds_ptr=bounds, out_ptr=out,
        N=rows, M=width, FIRST=first, ROWS=depth,
        stride_xn=x.stride(0),
        HAS_BOUNDS=bounds is not None, ACCUMULATE=accumulate,
        BLOCK_N=32, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def action_gradients(dbias: Tensor, action: Tensor, w_action: Tensor, b_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of action (B, A), w_action (H, A) and b_in (H,), in their types, of dbias fp32 (B, H)."""
    images, units = dbias.shape
    actions = action.shape[1]
    db = torch.empty(units, dtype=b_in.dtype, device=b_in.device)
    dw = torch.empty(units, actions, dtype=w_action.dtype, device=w_action.device)
    daction = torch.empty(images, actions, dtype=action.dtype, device=action.device)
    block_a = max(16, triton.next_power_of_2(actions))
    action_weight_grad_kernel[(triton.cdiv(units, 64),)](
        dbias_ptr=dbias, action_ptr=action, dw_ptr=dw, db_ptr=db,
        B=images, H=units, A=actions,
        stride_ai=action.stride(0),
        BLOCK_B=32, BLOCK_H=64, BLOCK_A=block_a, num_warps=4,
    )  # fmt: skip
    if images:
        action_grad_kernel[(triton.cdiv(images, 16),)](
            dbias_ptr=dbias, w_action_ptr=w_action, daction_ptr=daction,
            B=images, H=units, A=actions,
            stride_wh=w_action.stride(0),
            BLOCK_B=16, BLOCK_H=32, BLOCK_A=block_a, num_warps=4,
        )  # fmt: skip
    return daction, dw, db
