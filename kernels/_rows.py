"""Triton kernels that walk over rows of tokens: normalisation, activation, sums over an image's rows.

norm_kernel             LN(x) and the statistics of each row
norm_backward_kernel    gradient of LN's input, and sums for the gradients of its weight and bias, one row a program
segment_sum_kernel      Σ of the rows of each image, in their order
activate_kernel         act(u + bias[image]) in place, beside a library's products, and the gradient through it
distance_kernel         squared distance to gathered, normalised targets, and its gradient

A row is held in PARTS pieces of BLOCK_D, so that a width that is no power of two wastes no lanes (384 is 3 × 128) and
each number is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import gelu, gelu_slope, to_type

__all__ = [
    "activate_kernel",
    "distance_kernel",
    "norm_backward_kernel",
    "norm_kernel",
    "segment_sum_kernel",
]


@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
    N, D,
    stride_xn, stride_on,
    eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x (N, D) to LN(x) · weight + bias (N, D), with mean and 1 / deviation, fp32 (N,)."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)[:, None]
    values = ()
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        value = tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m_n[:, None] & (o < D)[None, :], other=0.0)
        values = values + (value.to(tl.float32),)
        total += tl.sum(values[part], axis=1)
    mean = total / D
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        centred = tl.where((part * BLOCK_D + o_d < D)[None, :], values[part] - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    rstd = tl.rsqrt(squares / D + eps)
    tl.store(mean_ptr + o_n, mean, mask=m_n)
    tl.store(rstd_ptr + o_n, rstd, mask=m_n)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        weight = tl.load(weight_ptr + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
        value = (values[part] - mean[:, None]) * rstd[:, None] * weight + bias
        p_out = out_ptr + rows * stride_on + o[None, :]
        tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m_n[:, None] & (o < D)[None, :])


@triton.jit
def norm_backward_kernel(
    dnormed_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    N, D,
    stride_xn, stride_rn, stride_dn,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx (N, D) of fp32 dnormed (N, D), plus the residual's gradient; dweight, dbias fp32 (programs, D), to be added.

    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dnormed · weight (Ba et al., arXiv:1607.06450, differentiated).
    """
    i = tl.program_id(0)
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)[:, None]
    mean = tl.load(mean_ptr + o_n, mask=m_n, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + o_n, mask=m_n, other=0.0)[:, None]
    scaled = ()
    hats = ()
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        grad = tl.load(dnormed_ptr + rows * D + o[None, :], mask=m, other=0.0)
        value = tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m, other=0.0).to(tl.float32)
        hat = tl.where(m, (value - mean) * rstd, 0.0)
        tl.store(dweight_ptr + i.to(tl.int64) * D + o, tl.sum(grad * hat, axis=0), mask=o < D)
        tl.store(dbias_ptr + i.to(tl.int64) * D + o, tl.sum(grad, axis=0), mask=o < D)
        g = grad * tl.load(weight_ptr + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
        sum_g += tl.sum(g, axis=1)
        sum_gx += tl.sum(g * hat, axis=1)
        scaled = scaled + (g,)
        hats = hats + (hat,)
    mean_g = (sum_g / D)[:, None]
    mean_gx = (sum_gx / D)[:, None]
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        dx = rstd * (scaled[part] - mean_g - hats[part] * mean_gx)
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + rows * stride_rn + o[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * stride_dn + o[None, :], to_type(dx, dx_ptr.dtype.element_ty), mask=m)


@triton.jit
def segment_sum_kernel(
    x_ptr, bounds_ptr, out_ptr,
    M,
    stride_xn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[i] += Σ x[bounds[i] : bounds[i + 1]] for x (N, M), fp32 out (segments, M); the rows in their order."""
    i = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    first = tl.load(bounds_ptr + i)
    last = tl.load(bounds_ptr + i + 1)
    if last > first:
        acc = tl.zeros((BLOCK_M,), tl.float32)
        for n in range(first, last, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m = (o_n < last)[:, None] & m_m[None, :]
            p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_xn + o_m[None, :]
            acc += tl.sum(tl.load(p_x, mask=m, other=0.0).to(tl.float32), axis=0)
        p_out = out_ptr + i.to(tl.int64) * M + o_m
        tl.store(p_out, tl.load(p_out, mask=m_m) + acc, mask=m_m)


@triton.jit
def activate_kernel(
    u_ptr, d_ptr, bias_ptr, image_ptr,
    N, M,
    stride_un, stride_bi,
    PER_IMAGE: tl.constexpr, HAS_GRADIENT: tl.constexpr, TANH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """u (N, M) becomes act(v) with v = u + bias[image], and d, if given and laid out as u, d · act'(v).

    bias fp32 (images, M) or (M,).
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < N, o_m < M
    m = m_n[:, None] & m_m[None, :]
    places = o_n.to(tl.int64)[:, None] * stride_un + o_m[None, :]
    v = tl.load(u_ptr + places, mask=m, other=0.0).to(tl.float32)
    if PER_IMAGE:
        b_image = tl.load(image_ptr + o_n, mask=m_n, other=0).to(tl.int64)
        v += tl.load(bias_ptr + b_image[:, None] * stride_bi + o_m[None, :], mask=m, other=0.0)
    else:
        v += tl.load(bias_ptr + o_m, mask=m_m, other=0.0)[None, :]
    tl.store(u_ptr + places, to_type(gelu(v, TANH), u_ptr.dtype.element_ty), mask=m)
    if HAS_GRADIENT:
        d = tl.load(d_ptr + places, mask=m, other=0.0).to(tl.float32)
        tl.store(d_ptr + places, to_type(d * gelu_slope(v, TANH), d_ptr.dtype.element_ty), mask=m)


@triton.jit
def distance_kernel(
    pred_ptr, target_ptr, index_ptr, incoming_ptr, sums_ptr, grad_ptr,
    N, M, D,
    stride_pn, stride_tm, stride_gn,
    scale, eps,
    HAS_INDEX: tl.constexpr, NORMALIZE: tl.constexpr, WRITE_SUM: tl.constexpr, WRITE_GRAD: tl.constexpr,
    HAS_INCOMING: tl.constexpr, SKIP_ONE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums (programs,) fp32: Σ‖pred − [LN](target[index])‖² of BLOCK_N rows each; grad (N, D): 2 · scale · difference.

    incoming (1,) fp32 multiplies the gradient; with SKIP_ONE an incoming 1 leaves grad as it is. A row of target that
    does not exist counts as NaN.
    """
    i = tl.program_id(0)
    factor = 2.0 * scale
    if HAS_INCOMING:
        incoming = tl.load(incoming_ptr)
        factor = factor * incoming
        if SKIP_ONE:
            if incoming == 1.0:
                return
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)
    wanted = rows
    if HAS_INDEX:
        wanted = tl.load(index_ptr + o_n, mask=m_n, other=0)
    m_t = m_n & (wanted >= 0) & (wanted < M)
    targets = ()
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        p_target = target_ptr + wanted[:, None] * stride_tm + o[None, :]
        value = tl.load(p_target, mask=m_t[:, None] & (o < D)[None, :], other=0.0).to(tl.float32)
        targets = targets + (value,)
        total += tl.sum(value, axis=1)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    gain = tl.full((BLOCK_N,), 1.0, tl.float32)
    if NORMALIZE:
        shift = total / D
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            centred = tl.where((part * BLOCK_D + o_d < D)[None, :], targets[part] - shift[:, None], 0.0)
            squares += tl.sum(centred * centred, axis=1)
        gain = tl.rsqrt(squares / D + eps)
    gain = tl.where(m_t | (o_n >= N), gain, float("nan"))
    distance = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        pred = tl.load(pred_ptr + rows[:, None] * stride_pn + o[None, :], mask=m, other=0.0).to(tl.float32)
        difference = tl.where(m, pred - (targets[part] - shift[:, None]) * gain[:, None], 0.0)
        if WRITE_SUM:
            distance += tl.sum(difference * difference, axis=1)
        if WRITE_GRAD:
            p_grad = grad_ptr + rows[:, None] * stride_gn + o[None, :]
            tl.store(p_grad, to_type(difference * factor, grad_ptr.dtype.element_ty), mask=m)
    if WRITE_SUM:
        tl.store(sums_ptr + i, tl.sum(distance, axis=0))
