"""Triton kernels for matrix multiplies, with what surrounds them done in the same pass.

linear_kernel           out = [residual +] act( x · wᵀ + bias + action[image of row] · w_actionᵀ )
hidden_backward_kernel  both multiplies of the MLP's hidden layer in the backward pass, and act's slope between them
weight_grad_kernel      aᵀ · b over a slice of the rows, one slice a program, for an ordered sum of the slices

Each exists in two forms, by the constants TMA and PERSISTENT: operands by pointers, a tile a program, so that two
programs of an SM overlap the epilogue of one with the loop of the other; or by tensor descriptors (sm_90 and later),
one program an SM that walks over the tiles, whose next operands are on their way while it computes an epilogue.

Accumulators are fp32, offsets of rows 64 bits wide, and each ragged store masked. Ragged loads of rows and columns are
clamped instead: what they read again is not stored. A row of x lies in one piece (its last stride is 1); weights may
lie either way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import dot, gelu, gelu_and_slope, ones, place_of_program, to_type

__all__ = ["hidden_backward_kernel", "linear_kernel", "weight_grad_kernel"]


@triton.jit
def _product(
    x_ptr, w_ptr, acc, n0, m0, N, M, K, stride_xn, stride_wm, stride_wk,
    ALONG_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[n0 :] · w[m0 :]ᵀ over all K, by pointers: (BLOCK_N, BLOCK_M). ALONG_K: w lies along K, else along M.

    Only offsets that memory does not lie along are clamped: clamped ones are not known to be neighbours.
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
def _action_product(
    acc, action_ptr, w_action_ptr, image_ptr, n0, m0, N, M, A, stride_ai, stride_wam,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """acc + action[image of row] · w_actionᵀ, one step of BLOCK_A in the depth: (BLOCK_N, BLOCK_M)."""
    o_n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    o_m = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1)
    o_a = tl.arange(0, BLOCK_A)
    image = tl.load(image_ptr + o_n)
    b_action = tl.load(action_ptr + image[:, None] * stride_ai + o_a[None, :], mask=(o_a < A)[None, :], other=0.0)
    b_w = tl.load(w_action_ptr + o_m[None, :] * stride_wam + o_a[:, None], mask=(o_a < A)[:, None], other=0.0)
    return dot(b_action, b_w, acc, PRECISION)


@triton.jit
def _bias(
    bias_ptr, image_ptr, n0, m0, N, M, stride_bi,
    PER_IMAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """fp32 bias of each row's image: (BLOCK_N, BLOCK_M), or (1, BLOCK_M) where all rows share one."""
    o_m = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1)
    if PER_IMAGE:
        o_n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
        image = tl.load(image_ptr + o_n).to(tl.int64)
        bias = tl.load(bias_ptr + image[:, None] * stride_bi + o_m[None, :]).to(tl.float32)
    else:
        bias = tl.load(bias_ptr + o_m).to(tl.float32)[None, :]
    return bias


@triton.jit
def _store(
    out, value, n0, m0, N, M, stride_on,
    TMA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[n0 :, m0 :] = value, (BLOCK_N, BLOCK_M), where there is such an element."""
    if TMA:
        out.store([n0, m0], to_type(value, DTYPE))
    else:
        o_n = n0 + tl.arange(0, BLOCK_N)
        o_m = m0 + tl.arange(0, BLOCK_M)
        p_out = out + o_n.to(tl.int64)[:, None] * stride_on + o_m[None, :]
        tl.store(p_out, to_type(value, DTYPE), mask=(o_n < N)[:, None] & (o_m < M)[None, :])


@triton.jit
def _finish(
    acc, bias_ptr, image_ptr, residual, out, n0, m0, N, M, stride_bi, stride_rn, stride_on,
    TMA: tl.constexpr, HAS_BIAS: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The epilogue of a piece of a tile: bias, activation, residual, store."""
    if HAS_BIAS:
        acc += _bias(bias_ptr, image_ptr, n0, m0, N, M, stride_bi, PER_IMAGE, BLOCK_N, BLOCK_M)
    if ACTIVATION != "none":
        acc = gelu(acc, ACTIVATION)
    if HAS_RESIDUAL:
        if TMA:
            acc += residual.load([n0, m0]).to(tl.float32)
        else:
            o_n = n0 + tl.arange(0, BLOCK_N)
            o_m = m0 + tl.arange(0, BLOCK_M)
            p_residual = residual + o_n.to(tl.int64)[:, None] * stride_rn + o_m[None, :]
            acc += tl.load(p_residual, mask=(o_n < N)[:, None] & (o_m < M)[None, :], other=0.0).to(tl.float32)
    _store(out, acc, n0, m0, N, M, stride_on, TMA, DTYPE, BLOCK_N, BLOCK_M)


@triton.jit
def _linear_tile(
    tile, x, w, bias_ptr, action_ptr, w_action_ptr, image_ptr, residual, out,
    N, M, K, A, rows, columns,
    stride_xn, stride_wm, stride_wk, stride_bi, stride_ai, stride_wam, stride_rn, stride_on,
    TMA: tl.constexpr, ALONG_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_ACTION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of `linear_kernel`."""
    i_n, i_m = place_of_program(tile, rows, columns, GROUP)
    n0, m0 = i_n * BLOCK_N, i_m * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            b_w = w.load([m0, k]).T if ALONG_K else w.load([k, m0])
            acc = dot(x.load([n0, k]), b_w, acc, PRECISION)
    else:
        acc = _product(
            x, w, acc, n0, m0, N, M, K, stride_xn, stride_wm, stride_wk,
            ALONG_K, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if HAS_ACTION:
        acc = _action_product(
            acc, action_ptr, w_action_ptr, image_ptr, n0, m0, N, M, A, stride_ai, stride_wam,
            PRECISION, BLOCK_N, BLOCK_M, BLOCK_A,
        )  # fmt: skip
    PIECE: tl.constexpr = BLOCK_M // PIECES
    if PIECES == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, PIECE)), (0, 2, 1)))
        _finish(
            left, bias_ptr, image_ptr, residual, out, n0, m0, N, M, stride_bi, stride_rn, stride_on,
            TMA, HAS_BIAS, PER_IMAGE, HAS_RESIDUAL, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip
        _finish(
            right, bias_ptr, image_ptr, residual, out, n0, m0 + PIECE, N, M, stride_bi, stride_rn, stride_on,
            TMA, HAS_BIAS, PER_IMAGE, HAS_RESIDUAL, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip
    else:
        _finish(
            acc, bias_ptr, image_ptr, residual, out, n0, m0, N, M, stride_bi, stride_rn, stride_on,
            TMA, HAS_BIAS, PER_IMAGE, HAS_RESIDUAL, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "PROGRAMS", "image_ptr"])
def linear_kernel(
    x, w, bias_ptr, action_ptr, w_action_ptr, image_ptr, residual, out,
    N, M, K, A, PROGRAMS,
    stride_xn, stride_wm, stride_wk, stride_bi, stride_ai, stride_wam, stride_rn, stride_on,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, ALONG_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_ACTION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (N, K), w (M, K), bias (images, M) or (M,), action (images, A), w_action (M, A), image int32 (N,); out (N, M).

    x, w, residual and out: pointers, or descriptors where TMA, residual's and out's of BLOCK_M / PIECES columns.
    """
    rows, columns = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
            _linear_tile(
                tile, x, w, bias_ptr, action_ptr, w_action_ptr, image_ptr, residual, out, N, M, K, A, rows, columns,
                stride_xn, stride_wm, stride_wk, stride_bi, stride_ai, stride_wam, stride_rn, stride_on,
                TMA, ALONG_K, EVEN_K, HAS_BIAS, PER_IMAGE, HAS_ACTION, HAS_RESIDUAL, ACTIVATION, DTYPE, PRECISION,
                PIECES, BLOCK_N, BLOCK_M, BLOCK_K, BLOCK_A, GROUP,
            )  # fmt: skip
    else:
        _linear_tile(
            tl.program_id(0), x, w, bias_ptr, action_ptr, w_action_ptr, image_ptr, residual, out, N, M, K, A, rows,
            columns, stride_xn, stride_wm, stride_wk, stride_bi, stride_ai, stride_wam, stride_rn, stride_on,
            TMA, ALONG_K, EVEN_K, HAS_BIAS, PER_IMAGE, HAS_ACTION, HAS_RESIDUAL, ACTIVATION, DTYPE, PRECISION,
            PIECES, BLOCK_N, BLOCK_M, BLOCK_K, BLOCK_A, GROUP,
        )  # fmt: skip


@triton.jit
def _finish_hidden(
    u, d, bias_ptr, image_ptr, hidden, dhidden, n0, h0, N, H, stride_bi, stride_hn,
    TMA: tl.constexpr, PER_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """hidden_backward_kernel's epilogue of a piece of a tile."""
    u += _bias(bias_ptr, image_ptr, n0, h0, N, H, stride_bi, PER_IMAGE, BLOCK_N, BLOCK_M)
    active, slope = gelu_and_slope(u, ACTIVATION)
    _store(hidden, active, n0, h0, N, H, stride_hn, TMA, DTYPE, BLOCK_N, BLOCK_M)
    _store(dhidden, d * slope, n0, h0, N, H, stride_hn, TMA, DTYPE, BLOCK_N, BLOCK_M)


@triton.jit
def _hidden_backward_tile(
    tile, x, w_in, bias_ptr, action_ptr, w_action_ptr, image_ptr, dout, w_out, hidden, dhidden,
    N, H, D, DO, A, rows, columns,
    stride_xn, stride_wih, stride_wid, stride_bi, stride_ai, stride_wah, stride_dn, stride_woh, stride_woo, stride_hn,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_ACTION: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of `hidden_backward_kernel`."""
    i_n, i_h = place_of_program(tile, rows, columns, GROUP)
    n0, h0 = i_n * BLOCK_N, i_h * BLOCK_M
    u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    d = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if TMA:  # one loop for both, whose operands past D or Do are zeros
        for k in range(0, tl.maximum(D, DO), BLOCK_K):
            u = dot(x.load([n0, k]), w_in.load([h0, k]).T, u, PRECISION)
            d = dot(dout.load([n0, k]), w_out.load([k, h0]), d, PRECISION)
    else:
        u = _product(
            x, w_in, u, n0, h0, N, H, D, stride_xn, stride_wih, stride_wid,
            True, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        d = _product(
            dout, w_out, d, n0, h0, N, H, DO, stride_dn, stride_woh, stride_woo,
            False, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if HAS_ACTION:
        u = _action_product(
            u, action_ptr, w_action_ptr, image_ptr, n0, h0, N, H, A, stride_ai, stride_wah,
            PRECISION, BLOCK_N, BLOCK_M, BLOCK_A,
        )  # fmt: skip
    PIECE: tl.constexpr = BLOCK_M // PIECES
    if PIECES == 2:
        u_left, u_right = tl.split(tl.permute(tl.reshape(u, (BLOCK_N, 2, PIECE)), (0, 2, 1)))
        d_left, d_right = tl.split(tl.permute(tl.reshape(d, (BLOCK_N, 2, PIECE)), (0, 2, 1)))
        _finish_hidden(
            u_left, d_left, bias_ptr, image_ptr, hidden, dhidden, n0, h0, N, H, stride_bi, stride_hn,
            TMA, PER_IMAGE, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip
        _finish_hidden(
            u_right, d_right, bias_ptr, image_ptr, hidden, dhidden, n0, h0 + PIECE, N, H, stride_bi, stride_hn,
            TMA, PER_IMAGE, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip
    else:
        _finish_hidden(
            u, d, bias_ptr, image_ptr, hidden, dhidden, n0, h0, N, H, stride_bi, stride_hn,
            TMA, PER_IMAGE, ACTIVATION, DTYPE, BLOCK_N, PIECE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "PROGRAMS", "image_ptr"])
def hidden_backward_kernel(
    x, w_in, bias_ptr, action_ptr, w_action_ptr, image_ptr, dout, w_out, hidden, dhidden,
    N, H, D, DO, A, PROGRAMS,
    stride_xn, stride_wih, stride_wid, stride_bi, stride_ai, stride_wah, stride_dn, stride_woh, stride_woo, stride_hn,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_K: tl.constexpr,
    PER_IMAGE: tl.constexpr, HAS_ACTION: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden = act(u) and dhidden = (dout · w_out) ∘ act'(u), of u = x · w_inᵀ + bias + action · w_actionᵀ, (N, H).

    x (N, D), w_in (H, D), dout (N, Do), w_out (Do, H) by its transpose's strides. u is recomputed: it was not saved.
    """
    rows, columns = tl.cdiv(N, BLOCK_N), tl.cdiv(H, BLOCK_M)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
            _hidden_backward_tile(
                tile, x, w_in, bias_ptr, action_ptr, w_action_ptr, image_ptr, dout, w_out, hidden, dhidden,
                N, H, D, DO, A, rows, columns,
                stride_xn, stride_wih, stride_wid, stride_bi, stride_ai, stride_wah, stride_dn, stride_woh, stride_woo,
                stride_hn, TMA, EVEN_K, PER_IMAGE, HAS_ACTION, ACTIVATION, DTYPE, PRECISION, PIECES,
                BLOCK_N, BLOCK_M, BLOCK_K, BLOCK_A, GROUP,
            )  # fmt: skip
    else:
        _hidden_backward_tile(
            tl.program_id(0), x, w_in, bias_ptr, action_ptr, w_action_ptr, image_ptr, dout, w_out, hidden, dhidden,
            N, H, D, DO, A, rows, columns,
            stride_xn, stride_wih, stride_wid, stride_bi, stride_ai, stride_wah, stride_dn, stride_woh, stride_woo,
            stride_hn, TMA, EVEN_K, PER_IMAGE, HAS_ACTION, ACTIVATION, DTYPE, PRECISION, PIECES,
            BLOCK_N, BLOCK_M, BLOCK_K, BLOCK_A, GROUP,
        )  # fmt: skip


@triton.jit
def _weight_grad_rows(
    a, b, acc, total, first, last, p0, q0, P, Q, stride_an, stride_bn,
    TMA: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_N, BLOCK_M) + aᵀ · b over the rows first : last and, with SUMS, total (BLOCK_N, 16) + aᵀ · 1."""
    if TMA:  # rows past N are zeros, and a slice ends with a block: ROWS is a multiple of BLOCK_K
        for r in range(first, last, BLOCK_K):
            b_a = a.load([r, p0]).T
            acc = dot(b_a, b.load([r, q0]), acc, PRECISION)
            if SUMS:
                total = dot(b_a, ones(BLOCK_K, 16, b_a.dtype), total, PRECISION)
    else:
        o_p, o_q = p0 + tl.arange(0, BLOCK_N), q0 + tl.arange(0, BLOCK_M)
        o_r = first + tl.arange(0, BLOCK_K)
        rows = o_r.to(tl.int64)
        p_a = a + rows[None, :] * stride_an + o_p[:, None]  # (BLOCK_N, BLOCK_K)
        p_b = b + rows[:, None] * stride_bn + o_q[None, :]  # (BLOCK_K, BLOCK_M)
        for r in range(first, last, BLOCK_K):
            m_r = o_r < last - (r - first)
            b_a = tl.load(p_a, mask=(o_p < P)[:, None] & m_r[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_r[:, None] & (o_q < Q)[None, :], other=0.0)
            acc = dot(b_a, b_b, acc, PRECISION)
            if SUMS:
                total = dot(b_a, ones(BLOCK_K, 16, b_a.dtype), total, PRECISION)
            p_a += BLOCK_K * stride_an
            p_b += BLOCK_K * stride_bn
    return acc, total


@triton.jit(do_not_specialize=["N", "ROWS"])
def weight_grad_kernel(
    a, b, out_ptr,
    N, P, Q, ROWS,
    stride_an, stride_bn, stride_os,
    TMA: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[s] (P, Q) = a[rows of slice s]ᵀ · b[rows of slice s]; a (N, P), b (N, Q), ROWS rows a slice.

    With a bias out[s] goes on with P numbers, the sums of a's columns: of operands in half precision, since the tensor
    cores multiply by ones. ROWS is a multiple of BLOCK_K. BLOCK_N × BLOCK_M is the block of the result, BLOCK_K the
    rows taken at a time.
    """
    i_p, i_q = place_of_program(tl.program_id(0), tl.cdiv(P, BLOCK_N), tl.cdiv(Q, BLOCK_M), GROUP)
    i_slice = tl.program_id(1)
    p0, q0 = i_p * BLOCK_N, i_q * BLOCK_M
    o_p, o_q = p0 + tl.arange(0, BLOCK_N), q0 + tl.arange(0, BLOCK_M)
    out_ptr += i_slice.to(tl.int64) * stride_os
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    first = i_slice * ROWS
    last = min(first + ROWS, N)
    if HAS_BIAS and i_q == 0:
        acc, total = _weight_grad_rows(
            a, b, acc, total, first, last, p0, q0, P, Q, stride_an, stride_bn,
            TMA, True, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        sums = tl.max(total, axis=1)  # all 16 are equal
        tl.store(out_ptr + P * Q + o_p, sums, mask=o_p < P)
    else:
        acc, total = _weight_grad_rows(
            a, b, acc, total, first, last, p0, q0, P, Q, stride_an, stride_bn,
            TMA, False, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    m_out = (o_p < P)[:, None] & (o_q < Q)[None, :]
    p_out = out_ptr + o_p.to(tl.int64)[:, None] * Q + o_q[None, :]
    tl.store(p_out, to_type(acc, out_ptr.dtype.element_ty), mask=m_out)
