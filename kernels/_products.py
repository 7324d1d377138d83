"""Triton kernels for products of matrices, with what surrounds them done in the same pass.

linear_kernel           out = [residual +] act( x · wᵀ + bias[image of row] )
hidden_backward_kernel  both products of the MLP's hidden layer on the way back, and act's slope between them
weight_grad_kernel      aᵀ · b over a slice of the rows, one slice a program, for an ordered sum of the slices
fused_mlp_kernel        the whole forward pass for narrow tokens: the hidden activations never leave the chip

Accumulators are fp32, offsets of rows 64 bits wide, and each ragged load and store is masked. A row of x lies in one
piece (its last stride is 1); weights may lie either way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import dot, gelu, gelu_slope, place_of_program, to_type

__all__ = ["fused_mlp_kernel", "hidden_backward_kernel", "linear_kernel", "weight_grad_kernel"]


@triton.jit
def _product(
    x_ptr, w_ptr, acc, o_n, o_m, m_n, m_m, K, stride_xn, stride_wm, stride_wk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[o_n] · w[o_m]ᵀ over all K: (BLOCK_N, BLOCK_M)."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_xn + o_k[None, :]  # (BLOCK_N, BLOCK_K)
    p_w = w_ptr + o_m.to(tl.int64)[None, :] * stride_wm + o_k.to(tl.int64)[:, None] * stride_wk  # (BLOCK_K, BLOCK_M)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        b_x = tl.load(p_x, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_k[:, None] & m_m[None, :], other=0.0)
        acc = dot(b_x, b_w, acc, PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K * stride_wk
    return acc


@triton.jit
def _image_bias(bias_ptr, image_ptr, o_n, o_m, m_n, m_m, stride_bi, PER_IMAGE: tl.constexpr):
    """fp32 bias of each row's image: (BLOCK_N, BLOCK_M), or (1, BLOCK_M) where all rows share one."""
    if PER_IMAGE:
        b_image = tl.load(image_ptr + o_n, mask=m_n, other=0).to(tl.int64)
        p_bias = bias_ptr + b_image[:, None] * stride_bi + o_m[None, :]
        bias = tl.load(p_bias, mask=m_n[:, None] & m_m[None, :], other=0.0).to(tl.float32)
    else:
        bias = tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    return bias


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, image_ptr, residual_ptr, out_ptr,
    N, M, K,
    stride_xn, stride_wm, stride_wk, stride_bi, stride_rn, stride_on,
    HAS_BIAS: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATE: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (N, K), w (M, K), bias (images, M) or (M,), image int32 (N,), residual and out (N, M)."""
    i_n, i_m = place_of_program(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < N, o_m < M
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = _product(
        x_ptr, w_ptr, acc, o_n, o_m, m_n, m_m, K, stride_xn, stride_wm, stride_wk, PRECISION, BLOCK_K
    )  # fmt: skip
    if HAS_BIAS:
        acc += _image_bias(bias_ptr, image_ptr, o_n, o_m, m_n, m_m, stride_bi, PER_IMAGE)
    if ACTIVATE:
        acc = gelu(acc, TANH)
    rows = o_n.to(tl.int64)[:, None]
    m_out = m_n[:, None] & m_m[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + rows * stride_rn + o_m[None, :], mask=m_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * stride_on + o_m[None, :], to_type(acc, out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def hidden_backward_kernel(
    x_ptr, w_in_ptr, bias_ptr, image_ptr, dout_ptr, w_out_ptr, hidden_ptr, dhidden_ptr,
    N, H, D, DO,
    stride_xn, stride_wih, stride_wid, stride_bi, stride_dn, stride_woh, stride_woo, stride_hn,
    PER_IMAGE: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden = act(u) and dhidden = (dout · w_out) ∘ act'(u), of u = x · w_inᵀ + bias[image], both (N, H).

    x (N, D), w_in (H, D), dout (N, Do), w_out (Do, H) by its transpose's strides. u is made again: it was not kept.
    """
    i_n, i_h = place_of_program(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(H, BLOCK_M), GROUP)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = i_h * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_h = o_n < N, o_h < H
    u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    u = _product(
        x_ptr, w_in_ptr, u, o_n, o_h, m_n, m_h, D, stride_xn, stride_wih, stride_wid, PRECISION, BLOCK_K
    )  # fmt: skip
    u += _image_bias(bias_ptr, image_ptr, o_n, o_h, m_n, m_h, stride_bi, PER_IMAGE)
    d = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    d = _product(
        dout_ptr, w_out_ptr, d, o_n, o_h, m_n, m_h, DO, stride_dn, stride_woh, stride_woo, PRECISION, BLOCK_K
    )  # fmt: skip
    m_out = m_n[:, None] & m_h[None, :]
    places = o_n.to(tl.int64)[:, None] * stride_hn + o_h[None, :]
    tl.store(hidden_ptr + places, to_type(gelu(u, TANH), hidden_ptr.dtype.element_ty), mask=m_out)
    tl.store(dhidden_ptr + places, to_type(d * gelu_slope(u, TANH), dhidden_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, out_ptr,
    N, P, Q, ROWS,
    stride_an, stride_bn,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[s] (P, Q) fp32 = a[rows of slice s]ᵀ · b[rows of slice s]; a (N, P), b (N, Q), ROWS rows a slice.

    BLOCK_N × BLOCK_M is the block of the result, BLOCK_K the rows taken at a time.
    """
    i_p, i_q = place_of_program(tl.program_id(0), tl.cdiv(P, BLOCK_N), tl.cdiv(Q, BLOCK_M), GROUP)
    i_slice = tl.program_id(1)
    o_p = i_p * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = i_q * BLOCK_M + tl.arange(0, BLOCK_M)
    m_p, m_q = o_p < P, o_q < Q
    first = i_slice * ROWS
    last = min(first + ROWS, N)
    o_r = first + tl.arange(0, BLOCK_K)
    p_a = a_ptr + o_r.to(tl.int64)[None, :] * stride_an + o_p[:, None]  # (BLOCK_N, BLOCK_K)
    p_b = b_ptr + o_r.to(tl.int64)[:, None] * stride_bn + o_q[None, :]  # (BLOCK_K, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in range(first, last, BLOCK_K):
        m_r = o_r < last - (r - first)
        b_a = tl.load(p_a, mask=m_p[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_r[:, None] & m_q[None, :], other=0.0)
        acc = dot(b_a, b_b, acc, PRECISION)
        p_a += BLOCK_K * stride_an
        p_b += BLOCK_K * stride_bn
    places = (i_slice.to(tl.int64) * P + o_p[:, None]) * Q + o_q[None, :]
    tl.store(out_ptr + places, acc, mask=m_p[:, None] & m_q[None, :])


@triton.jit
def fused_mlp_kernel(
    x_ptr, w_in_ptr, bias_ptr, image_ptr, w_out_ptr, b_out_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    N, H, D,
    stride_xn, stride_wih, stride_bi, stride_woo, stride_on,
    eps,
    HAS_NORM: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out (N, D) = [x +] act( [LN](x) · w_inᵀ + bias[image] ) · w_outᵀ + b_out for BLOCK_N tokens a program.

    Tokens stay on the chip in PARTS pieces of BLOCK_D (tiles are powers of two, widths are not: 384 is 3 × 128), and
    the weights are streamed past them, BLOCK_M hidden units at a time. w_in (H, D), w_out (D, H), both contiguous rows.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)[:, None]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tokens = ()
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        tokens = tokens + (tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m, other=0.0),)
    if HAS_NORM:
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            mean += tl.sum(tokens[part].to(tl.float32), axis=1)
        mean = mean / D
        variance = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            centred = tokens[part].to(tl.float32) - mean[:, None]
            centred = tl.where((part * BLOCK_D + o_d < D)[None, :], centred, 0.0)
            variance += tl.sum(centred * centred, axis=1)
        rstd = tl.rsqrt(variance / D + eps)
        normed = ()
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            gain = tl.load(norm_weight_ptr + o, mask=o < D, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + o, mask=o < D, other=0.0).to(tl.float32)
            value = (tokens[part].to(tl.float32) - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
            normed = normed + (to_type(value, kind),)
        tokens = normed
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    for h in range(0, H, BLOCK_M):
        o_h = h + tl.arange(0, BLOCK_M)
        m_h = o_h < H
        u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            p_in = w_in_ptr + o_h[None, :] * stride_wih + o[:, None]  # (BLOCK_D, BLOCK_M)
            u = dot(tokens[part], tl.load(p_in, mask=m_h[None, :] & (o < D)[:, None], other=0.0), u, PRECISION)
        u += _image_bias(bias_ptr, image_ptr, o_n, o_h, m_n, m_h, stride_bi, PER_IMAGE)
        # An infinite token would turn the padding's zeros into NaN, and they would enter every sum below.
        hidden = to_type(tl.where(m_h[None, :], gelu(u, TANH), 0.0), kind)
        added = ()
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            p_out = w_out_ptr + o[None, :] * stride_woo + o_h[:, None]  # (BLOCK_M, BLOCK_D)
            b_out = tl.load(p_out, mask=m_h[:, None] & (o < D)[None, :], other=0.0)
            added = added + (dot(hidden, b_out, sums[part], PRECISION),)
        sums = added
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m_out = m_n[:, None] & (o < D)[None, :]
        value = sums[part] + tl.load(b_out_ptr + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:  # read again: held through the loop it would take the registers of the sums
            value += tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m_out, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * stride_on + o[None, :], to_type(value, kind), mask=m_out)
