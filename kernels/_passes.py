"""Triton kernels that pass once over memory, without a sum: what several of PyTorch's operators walk over again.

average_kernel     the moving average of many tensors, and its rounded copy
patchify_kernel    the wanted patches of images, normalised
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import to_type

__all__ = ["average_kernel", "patchify_kernel"]


@triton.jit
def average_kernel(
    average_ptr, weight_ptr, copy_ptr, table_ptr, unless_ptr,
    step,
    HAS_COPY: tl.constexpr, HAS_UNLESS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """average += step · (weight − average), fp32, and copy = average; a row of the table a program.

    table int64 (programs, 4): where its part of average, of weight and of copy begins, in elements from the pointers,
    which are of the first tensor of many, and the elements that are left there. ALIGNED: all of that divides by 4.
    HAS_UNLESS: step is 0 where the one fp32 at unless_ptr is not.
    """
    p_row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    average = tl.load(p_row)
    weight = tl.load(p_row + 1)
    left = tl.load(p_row + 3)
    if ALIGNED:
        average = tl.multiple_of(average, 4)
        weight = tl.multiple_of(weight, 4)
        left = tl.multiple_of(left, 4)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < left
    old = tl.load(average_ptr + average + o_n, mask=m_n, other=0.0)
    new = tl.load(weight_ptr + weight + o_n, mask=m_n, other=0.0)
    if HAS_UNLESS:
        step = tl.where(tl.load(unless_ptr) == 0.0, step, 0.0)
    # torch.lerp's two forms: each is exact at its own end.
    value = tl.where(step < 0.5, old + step * (new - old), new - (new - old) * (1.0 - step))
    tl.store(average_ptr + average + o_n, value, mask=m_n)
    if HAS_COPY:
        copy = tl.load(p_row + 2)
        if ALIGNED:
            copy = tl.multiple_of(copy, 4)
        tl.store(copy_ptr + copy + o_n, to_type(value, copy_ptr.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["N", "B", "GRID", "patches_ptr", "image_ptr"])
def patchify_kernel(
    images_ptr, patches_ptr, image_ptr, scale_ptr, shift_ptr, out_ptr,
    N, B, GRID,
    stride_xb, stride_xy, stride_on,
    HAS_INDEX: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[n] = level · scale + shift over the PATCH · PATCH · 3 levels of patch patches[n] of images[image[n]].

    images uint8 (B, GRID · PATCH, GRID · PATCH, 3), a line of pixels in one piece. Without an index all patches of all
    images, in their order. A patch that does not exist counts as NaN.
    """
    LINE: tl.constexpr = PATCH * 3
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)
    if HAS_INDEX:
        patch = tl.load(patches_ptr + o_n, mask=m_n, other=0)
        image = tl.load(image_ptr + o_n, mask=m_n, other=0)
    else:
        patch = rows % (GRID * GRID)
        image = rows // (GRID * GRID)
    m_x = m_n & (patch >= 0) & (patch < GRID * GRID) & (image >= 0) & (image < B)
    first = image * stride_xb + (patch // GRID) * PATCH * stride_xy + (patch % GRID) * LINE
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m_d = o < PATCH * LINE
        p_levels = images_ptr + first[:, None] + ((o // LINE) * stride_xy + o % LINE)[None, :]
        level = tl.load(p_levels, mask=m_x[:, None] & m_d[None, :], other=0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        # Each row loads them for itself: shared out, they would pass through shared memory.
        scale = tl.load(scale_ptr + 0 * rows[:, None] + o[None, :], mask=m_d[None, :], other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + 0 * rows[:, None] + o[None, :], mask=m_d[None, :], other=0.0).to(tl.float32)
        value = tl.where(m_x[:, None], level * scale + shift, float("nan"))
        p_out = out_ptr + rows[:, None] * stride_on + o[None, :]
        tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
