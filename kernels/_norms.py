"""Triton kernels of the layer normalisation of rows of tokens.

norm_kernel             LN(x), or the sum x + branch and its LN
norm_backward_kernel    gradient of what was normalised, and sums for the gradients of weight and bias

A row is held whole, in PARTS pieces of BLOCK_D, so each number is read once. The backward pass has the row at hand and
takes its mean and deviation again: kept, they would be 16 bytes a row to write and read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import to_type

__all__ = ["norm_backward_kernel", "norm_kernel"]


@triton.jit
def row_statistics(values, D, eps, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1 / deviation of each row, (BLOCK_N,), of its pieces (BLOCK_N, BLOCK_D), zero past D."""
    # Pieces are added first, so that lanes meet once for all of them.
    total = values[0]
    for part in tl.static_range(1, PARTS):
        total += values[part]
    mean = tl.sum(total, axis=1) / D
    squares = tl.zeros_like(total)
    for part in tl.static_range(PARTS):
        inside = part * BLOCK_D + tl.arange(0, BLOCK_D) < D
        centred = tl.where(inside[None, :], values[part] - mean[:, None], 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / D + eps)


@triton.jit(do_not_specialize=["N"])
def norm_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr,
    N, D,
    stride_xn, stride_bn, stride_tn, stride_on,
    eps,
    HAS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x (N, D) to LN(x) · weight + bias (N, D); with a branch (N, D), to total = x + branch and the LN of that.

    What is normalised is the total as it is stored, so that the backward pass finds the same numbers.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)[:, None]
    values = ()
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        value = tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            value += tl.load(branch_ptr + rows * stride_bn + o[None, :], mask=m, other=0.0).to(tl.float32)
            stored = to_type(value, total_ptr.dtype.element_ty)
            tl.store(total_ptr + rows * stride_tn + o[None, :], stored, mask=m)
            value = stored.to(tl.float32)
        values = values + (value,)
    mean, rstd = row_statistics(values, D, eps, BLOCK_D, PARTS)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        # Each row loads them for itself: shared out, they would pass through shared memory.
        weight = tl.load(weight_ptr + 0 * rows + o[None, :], mask=m, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + 0 * rows + o[None, :], mask=m, other=0.0).to(tl.float32)
        value = (values[part] - mean[:, None]) * rstd[:, None] * weight + bias
        p_out = out_ptr + rows * stride_on + o[None, :]
        tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "ROWS"])
def norm_backward_kernel(
    dnormed_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr, sums_ptr,
    N, D, ROWS,
    stride_gn, stride_xn, stride_rn, stride_dn,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx (N, D) of dnormed (N, D), plus the residual's gradient; sums fp32 (programs, 2, D): parts of those of weight
    and bias, to be added.

    A program takes ROWS rows, a multiple of BLOCK_N, in their order. Each of its BLOCK_N rows has sums of its own,
    added after the loop: where a warp holds a row whole, nothing in the loop waits for another warp.

    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dnormed · weight (Ba et al., arXiv:1607.06450, differentiated).
    """
    i = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    dweights = ()
    dbiases = ()
    for _ in tl.static_range(PARTS):
        dweights = dweights + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        dbiases = dbiases + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    for first in range(i * ROWS, min(i * ROWS + ROWS, N), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        rows = o_n.to(tl.int64)[:, None]
        values = ()
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            p_x = x_ptr + rows * stride_xn + o[None, :]
            values = values + (tl.load(p_x, mask=m_n[:, None] & (o < D)[None, :], other=0.0).to(tl.float32),)
        mean, rstd = row_statistics(values, D, eps, BLOCK_D, PARTS)
        scaled = ()
        hats = ()
        more_dweights = ()
        more_dbiases = ()
        sum_g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        sum_gx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            m = m_n[:, None] & (o < D)[None, :]
            grad = tl.load(dnormed_ptr + rows * stride_gn + o[None, :], mask=m, other=0.0).to(tl.float32)
            hat = tl.where(m, (values[part] - mean[:, None]) * rstd[:, None], 0.0)
            more_dweights = more_dweights + (dweights[part] + grad * hat,)
            more_dbiases = more_dbiases + (dbiases[part] + grad,)
            # Each row loads the weight for itself: shared out, it would pass through shared memory.
            g = grad * tl.load(weight_ptr + 0 * rows + o[None, :], mask=m, other=0.0).to(tl.float32)
            sum_g += g
            sum_gx += g * hat
            scaled = scaled + (g,)
            hats = hats + (hat,)
        dweights = more_dweights
        dbiases = more_dbiases
        mean_g = (tl.sum(sum_g, axis=1) / D)[:, None]
        mean_gx = (tl.sum(sum_gx, axis=1) / D)[:, None]
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            m = m_n[:, None] & (o < D)[None, :]
            dx = rstd[:, None] * (scaled[part] - mean_g - hats[part] * mean_gx)
            if HAS_RESIDUAL:
                dx += tl.load(residual_ptr + rows * stride_rn + o[None, :], mask=m, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows * stride_dn + o[None, :], to_type(dx, dx_ptr.dtype.element_ty), mask=m)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        tl.store(sums_ptr + 2 * i.to(tl.int64) * D + o, tl.sum(dweights[part], axis=0), mask=o < D)
        tl.store(sums_ptr + (2 * i.to(tl.int64) + 1) * D + o, tl.sum(dbiases[part], axis=0), mask=o < D)
