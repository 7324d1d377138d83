"""Sums over rows: per image, per column, and the gradients of the action behind the images' biases.

All in fp32 and in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.jit import to_type
from iwm_fast.kernels._lib.rows import SUM_PROGRAMS

__all__ = [
    "action_grad_kernel",
    "action_gradients",
    "action_weight_grad_kernel",
    "column_sums",
    "image_kernel",
    "image_of_rows",
    "segment_sum_kernel",
    "segment_sums",
]

# Fewest rows of a column that one program sums.
_SUM_ROWS = 256
# A program of the action's kernels holds all components: above 512 they do not fit into the shared memory of a consumer
# GPU (101,376 bytes; 135,168 are compiled for 600), from 257 on its sums leave the registers.
_MOST_ACTIONS = 64


@triton.jit(do_not_specialize=["N", "cu_seqlens_ptr"])
@no_type_check
def image_kernel(cu_seqlens_ptr, image_ptr, N, BLOCK: tl.constexpr):
    """image (N,) = i for cu_seqlens[i] ≤ n < cu_seqlens[i + 1], int32; one program per image."""
    i = tl.program_id(0)
    first = tl.maximum(tl.load(cu_seqlens_ptr + i), 0)
    last = tl.minimum(tl.load(cu_seqlens_ptr + i + 1), N)  # wrong bounds write nothing outside
    for n in range(first, last, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        tl.store(image_ptr + o_n, tl.zeros((BLOCK,), tl.int32) + i, mask=o_n < last)


@triton.jit(do_not_specialize=["N", "FIRST", "ROWS", "bounds_ptr"])
@no_type_check
def segment_sum_kernel(
    x_ptr, bounds_ptr, out_ptr,
    N, M, FIRST, ROWS,
    stride_xn,
    HAS_BOUNDS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[i] [+]= Σ of segment i's rows of x (N, M), in their order; fp32 out (segments, M).

    Segment i is bounds[i] − FIRST : bounds[i + 1] − FIRST, as far as there are such rows, or i · ROWS : (i + 1) · ROWS.
    """
    i = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if HAS_BOUNDS:
        first = tl.maximum(tl.load(bounds_ptr + i) - FIRST, 0)
        last = tl.minimum(tl.load(bounds_ptr + i + 1) - FIRST, N)
    else:
        first = i * ROWS
        last = tl.minimum(first + ROWS, N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for n in range(first, last, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m = (o_n < last)[:, None] & m_m[None, :]
        p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_xn + o_m[None, :]
        acc += tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    p_out = out_ptr + i.to(tl.int64) * M + o_m
    if ACCUMULATE:
        total += tl.load(p_out, mask=m_m, other=0.0)
    tl.store(p_out, total, mask=m_m)


@triton.jit(do_not_specialize=["B"])
@no_type_check
def action_weight_grad_kernel(
    dbias_ptr, action_ptr, dw_ptr, db_ptr,
    B, H, A,
    stride_ai,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """dw (H, A) = dbiasᵀ · action and db (H,) = Σ dbias over images, from dbias fp32 (B, H); sums in a fixed order."""
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_a = tl.arange(0, BLOCK_A)
    m_h = o_h < H
    dw = tl.zeros((BLOCK_H, BLOCK_A), tl.float32)
    db = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    for b in range(0, B, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        p_dbias = dbias_ptr + o_b.to(tl.int64)[None, :] * H + o_h[:, None]  # (BLOCK_H, BLOCK_B)
        dbias = tl.load(p_dbias, mask=m_h[:, None] & (o_b < B)[None, :], other=0.0)
        p_action = action_ptr + o_b.to(tl.int64)[:, None] * stride_ai + o_a[None, :]
        action = tl.load(p_action, mask=(o_b < B)[:, None] & (o_a < A)[None, :], other=0.0).to(tl.float32)
        dw = tl.dot(dbias, action, dw, input_precision="ieee")
        db += dbias
    p_dw = dw_ptr + o_h.to(tl.int64)[:, None] * A + o_a[None, :]
    tl.store(p_dw, to_type(dw, dw_ptr.dtype.element_ty), mask=m_h[:, None] & (o_a < A)[None, :])
    tl.store(db_ptr + o_h, to_type(tl.sum(db, axis=1), db_ptr.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["B"])
@no_type_check
def action_grad_kernel(
    dbias_ptr, w_action_ptr, daction_ptr,
    B, H, A,
    stride_wh,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """daction (B, A) = dbias · w_action, from dbias fp32 (B, H) and w_action (H, A); sums in a fixed order."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_a = tl.arange(0, BLOCK_A)
    m_b, m_a = o_b < B, o_a < A
    acc = tl.zeros((BLOCK_B, BLOCK_A), tl.float32)
    for h in range(0, H, BLOCK_H):
        o_h = h + tl.arange(0, BLOCK_H)
        p_dbias = dbias_ptr + o_b.to(tl.int64)[:, None] * H + o_h[None, :]
        dbias = tl.load(p_dbias, mask=m_b[:, None] & (o_h < H)[None, :], other=0.0)
        p_w = w_action_ptr + o_h.to(tl.int64)[:, None] * stride_wh + o_a[None, :]
        w = tl.load(p_w, mask=(o_h < H)[:, None] & m_a[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(dbias, w, acc, input_precision="ieee")
    p_out = daction_ptr + o_b.to(tl.int64)[:, None] * A + o_a[None, :]
    tl.store(p_out, to_type(acc, daction_ptr.dtype.element_ty), mask=m_b[:, None] & m_a[None, :])


def image_of_rows(rows: int, cu_seqlens: Tensor) -> Tensor:
    """Return the image of each of `rows` rows, int32 (N,), from their bounds int32 (B + 1,)."""
    image = torch.empty(rows, dtype=torch.int32, device=cu_seqlens.device)
    if rows:
        image_kernel[(len(cu_seqlens) - 1,)](
            cu_seqlens_ptr=cu_seqlens, image_ptr=image, N=rows, BLOCK=256, num_warps=4
        )  # fmt: skip
    return image


def segment_sums(x: Tensor, bounds: Tensor, first: int, out: Tensor, *, accumulate: bool) -> None:
    """Write, or add, the sum of each segment's rows of x (N, M) to fp32 out (segments, M).

    bounds: int32 (segments + 1,), row numbers; x's first row is number `first`.
    """
    _segment_sums(x, bounds, first, 0, out, accumulate=accumulate)


def column_sums(x: Tensor) -> Tensor:
    """Return partial sums of x's rows (N, M), fp32 (programs, M), for `add_slices`."""
    rows = max(1, x.shape[0])
    depth = _SUM_ROWS * triton.cdiv(triton.cdiv(rows, _SUM_ROWS), SUM_PROGRAMS)
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
    """Return gradients of action (B, A), w_action (H, A) and b_in (H,), in their dtypes, from dbias fp32 (B, H)."""
    images, units = dbias.shape
    actions = action.shape[1]
    if actions > _MOST_ACTIONS:
        dw, daction = dbias.mT @ action.float(), dbias @ w_action.float()
        return daction.to(action.dtype), dw.to(w_action.dtype), dbias.sum(dim=0).to(b_in.dtype)
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
