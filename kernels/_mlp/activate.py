"""Bias and activation in place after a library's matmul, and the gradient through them."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.jit import gelu, gelu_and_slope, to_type

from .operands import Bias, activation_kind, image_bias

__all__ = ["activate", "activate_kernel"]


@triton.jit(do_not_specialize=["N", "image_ptr"])
@no_type_check
def activate_kernel(
    u_ptr, d_ptr, bias_ptr, image_ptr,
    N, M,
    stride_un, stride_bi,
    PER_IMAGE: tl.constexpr, HAS_GRADIENT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """u (N, M) becomes act(v) with v = u + bias[image]; d, if given and with u's layout, becomes d · act'(v).

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
        v += tl.load(bias_ptr + b_image[:, None] * stride_bi + o_m[None, :], mask=m, other=0.0).to(tl.float32)
    else:
        v += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    if HAS_GRADIENT:
        d = tl.load(d_ptr + places, mask=m, other=0.0).to(tl.float32)
        active, slope = gelu_and_slope(v, ACTIVATION)
        tl.store(d_ptr + places, to_type(d * slope, d_ptr.dtype.element_ty), mask=m)
    else:
        active = gelu(v, ACTIVATION)
    tl.store(u_ptr + places, to_type(active, u_ptr.dtype.element_ty), mask=m)


def activate(u: Tensor, d: Tensor | None, bias: Bias, activation: str) -> None:
    """Replace u (N, M) by act(u + bias), and d (N, M) by the gradient through it."""
    assert d is None or d.stride() == u.stride()
    bias = _without_action(bias)
    rows, columns = u.shape
    activate_kernel[(triton.cdiv(rows, 16), triton.cdiv(columns, 128))](
        u_ptr=u, d_ptr=d, bias_ptr=bias.row, image_ptr=bias.image,
        N=rows, M=columns,
        stride_un=u.stride(0), stride_bi=columns,
        PER_IMAGE=bias.kind == "image", HAS_GRADIENT=d is not None, ACTIVATION=activation_kind(activation, u.dtype),
        BLOCK_N=16, BLOCK_M=128, num_warps=4,
    )  # fmt: skip


def _without_action(bias: Bias) -> Bias:
    """Return the bias with the action's part added, fp32 (images, M)."""
    if bias.action is None or bias.w_action is None:
        return bias
    return Bias(image_bias(bias.row, bias.action, bias.w_action), bias.image)
