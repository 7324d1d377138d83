"""Building blocks of the MLP's matmul kernels: multiply, add an action, add a bias, store.

Each kernel has two forms, by the constants TMA and PERSISTENT. Without: operands by pointers, one tile per program, and
two programs on an SM overlap the epilogue of one with the loop of the other. With: operands by tensor descriptors
(sm_90 and later), one program per SM that iterates over tiles and loads the next operands while it computes an
epilogue.

Accumulators are fp32, row offsets 64-bit, and each ragged store is masked. Ragged loads of rows and columns are clamped
instead: the repeated values are not stored. Rows of x are contiguous (last stride 1); weights may have either layout.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from iwm_fast.kernels._lib.jit import dot, to_type

__all__ = ["add_action", "add_product", "bias_of_tile", "store_tile"]


@triton.jit
@no_type_check
def add_product(
    x_ptr, w_ptr, acc, n0, m0, N, M, K, stride_xn, stride_wm, stride_wk,
    ALONG_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + x[n0 :] · w[m0 :]ᵀ over all K, by pointers: (BLOCK_N, BLOCK_M). ALONG_K: w is contiguous along K.

    Only offsets along the strided dimension are clamped: the compiler cannot see that clamped offsets are contiguous.
    """
    o_n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    o_m = m0 + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if ALONG_K:
        o_m = tl.minimum(o_m, M - 1)
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_n[:, None] * stride_xn + o_k[None, :]  # (BLOCK_N, BLOCK_K)
    p_w = w_ptr + o_m.to(tl.int64)[None, :] * stride_wm + o_k.to(tl.int64)[:, None] * stride_wk  # (BLOCK_K, BLOCK_M)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        b_x = tl.load(p_x) if EVEN_K else tl.load(p_x, mask=m_k[None, :], other=0.0)
        if EVEN_K and ALONG_K:
            b_w = tl.load(p_w)
        elif EVEN_K:
            b_w = tl.load(p_w, mask=m_m[None, :], other=0.0)
        elif ALONG_K:
            b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
        else:
            b_w = tl.load(p_w, mask=m_k[:, None] & m_m[None, :], other=0.0)
        acc = dot(b_x, b_w, acc, PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K * stride_wk
    return acc


@triton.jit
@no_type_check
def add_action(
    acc, action_ptr, w_action_ptr, image_ptr, n0, m0, N, M, A, stride_ai, stride_wam,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Return acc + action[image of row] · w_actionᵀ, one iteration of depth BLOCK_A: (BLOCK_N, BLOCK_M)."""
    o_n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    o_m = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1)
    o_a = tl.arange(0, BLOCK_A)
    image = tl.load(image_ptr + o_n)
    b_action = tl.load(action_ptr + image[:, None] * stride_ai + o_a[None, :], mask=(o_a < A)[None, :], other=0.0)
    b_w = tl.load(w_action_ptr + o_m[None, :] * stride_wam + o_a[:, None], mask=(o_a < A)[:, None], other=0.0)
    return dot(b_action, b_w, acc, PRECISION)


@triton.jit
@no_type_check
def bias_of_tile(
    bias_ptr, image_ptr, n0, m0, N, M, stride_bi,
    PER_IMAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return the fp32 bias of each row's image: (BLOCK_N, BLOCK_M), or (1, BLOCK_M) if all rows share one."""
    o_m = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1)
    if PER_IMAGE:
        o_n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
        image = tl.load(image_ptr + o_n).to(tl.int64)
        bias = tl.load(bias_ptr + image[:, None] * stride_bi + o_m[None, :]).to(tl.float32)
    else:
        bias = tl.load(bias_ptr + o_m).to(tl.float32)[None, :]
    return bias


@triton.jit
@no_type_check
def store_tile(
    out, value, n0, m0, N, M, stride_on,
    TMA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store value (BLOCK_N, BLOCK_M) to out[n0 :, m0 :] within its bounds."""
    if TMA:
        out.store([n0, m0], to_type(value, DTYPE))
    else:
        o_n = n0 + tl.arange(0, BLOCK_N)
        o_m = m0 + tl.arange(0, BLOCK_M)
        p_out = out + o_n.to(tl.int64)[:, None] * stride_on + o_m[None, :]
        tl.store(p_out, to_type(value, DTYPE), mask=(o_n < N)[:, None] & (o_m < M)[None, :])
