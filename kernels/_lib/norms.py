"""LayerNorm of rows of tokens, by Triton kernels: LN of x, of x + branch, and the backward pass.

A row is held whole, in PARTS pieces of BLOCK_D, so each element is read once. The backward pass reads the row anyway
and recomputes its mean and std: saved, they would be 16 bytes per row to write and read.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import to_type
from .rows import rows_a_sum, rows_in_warps

__all__ = ["norm_backward", "norm_backward_kernel", "norm_kernel", "normalise", "row_statistics"]


@triton.jit
@no_type_check
def row_statistics(values, D, eps, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Return mean and 1 / std of each row, (BLOCK_N,), from its pieces (BLOCK_N, BLOCK_D), zero past D."""
    # Add pieces first, so that lanes synchronise once for all of them.
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
@no_type_check
def norm_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr,
    N, D,
    stride_xn, stride_bn, stride_tn, stride_on,
    eps,
    HAS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Map x (N, D) to LN(x) · weight + bias (N, D); with a branch (N, D), to total = x + branch and the LN of that.

    The total is normalised as it is stored, rounded, so that the backward pass recomputes from the same values.
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
        # Each row loads the weights itself: shared between rows, they would go through shared memory.
        weight = tl.load(weight_ptr + 0 * rows + o[None, :], mask=m, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + 0 * rows + o[None, :], mask=m, other=0.0).to(tl.float32)
        value = (values[part] - mean[:, None]) * rstd[:, None] * weight + bias
        p_out = out_ptr + rows * stride_on + o[None, :]
        tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "ROWS"])
@no_type_check
def norm_backward_kernel(
    dnormed_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr, sums_ptr,
    N, D, ROWS,
    stride_gn, stride_xn, stride_rn, stride_dn,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write dx (N, D) from dnormed (N, D), plus the residual's gradient; and partial sums of weight's and bias's
    gradients, fp32 (programs, 2, D).

    A program takes ROWS rows, a multiple of BLOCK_N, in their order. Each of its BLOCK_N rows has its own sums, added
    up after the loop: if a warp holds a row whole, nothing in the loop waits for another warp.

    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dnormed · weight (Ba et al., arXiv:1607.06450,
    differentiated).
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
            # Each row loads the weight itself: shared between rows, it would go through shared memory.
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


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, branch: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Return LN(x) (N, D) in x's dtype; or LN(x + branch), with the sum written to `total` (N, D)."""
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
    """Write LN's gradient, plus `residual`, to dx (N, D); return partial sums of weight's and bias's gradients.

    They are fp32 (programs, 2, D), for `add_slices`.
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
