"""Gradients of the MLP's weights: aᵀ · b over slices of the rows, one slice per program, then added in their order."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.jit import dot, ones, place_of_program, to_type
from iwm_fast.kernels._tuning.candidates import Choice, slices_of
from iwm_fast.kernels._tuning.tuner import tuner

from .operands import GROUP, descriptor, layout_of, precision, processors

__all__ = ["weight_grad_kernel", "weight_grad_slices"]


@triton.jit
@no_type_check
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
@no_type_check
def weight_grad_kernel(
    a, b, out_ptr,
    N, P, Q, ROWS,
    stride_an, stride_bn, stride_os,
    TMA: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[s] (P, Q) = a[rows of slice s]ᵀ · b[rows of slice s]; a (N, P), b (N, Q), ROWS rows per slice.

    With a bias, out[s] has P more elements, the sums of a's columns, in half precision only: tensor cores multiply by
    ones. ROWS is a multiple of BLOCK_K. BLOCK_N × BLOCK_M is the tile of the result, BLOCK_K the rows per iteration.
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


def weight_grad_slices(a: Tensor, b: Tensor, *, bias: bool = False) -> Tensor:
    """Return slices of aᵀ · b, fp32 (S, P · Q), for `add_gradients`, with a (N, P) and b (N, Q).

    bias: append slices of the sums of a's columns: (S, P · Q + P). Half-precision operands only.
    """
    rows, p, q = a.shape[0], a.shape[1], b.shape[1]
    length = p * q + (p if bias else 0)

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            whole = torch.empty(1, length, dtype=torch.float32, device=a.device)
            _library_weight_grad(a, b, whole[0, : p * q].view(p, q))
            if bias:
                torch.sum(a, 0, dtype=torch.float32, out=whole[0, p * q :])
            return whole
        tma = choice.by == "tma"
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        blocks = triton.cdiv(p, n) * triton.cdiv(q, m)
        slices = slices_of(blocks, triton.cdiv(rows, k), processors(a.device))
        sums = torch.empty(slices, length, dtype=torch.float32, device=a.device)
        depth = triton.cdiv(triton.cdiv(rows, slices), k) * k
        weight_grad_kernel[(blocks, slices)](
            a=descriptor(a, k, n) if tma else a, b=descriptor(b, k, m) if tma else b, out_ptr=sums,
            N=rows, P=p, Q=q, ROWS=depth,
            stride_an=a.stride(0), stride_bn=b.stride(0), stride_os=length,
            TMA=tma, HAS_BIAS=bias, PRECISION=precision(),
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, GROUP=GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return sums

    about = f"{layout_of(a, b)}{' bias' if bias else ''}"
    return tuner(a.device).run("weight_grad", a.dtype, (rows, p, q), call, about)


def _library_weight_grad(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a.t(), b, out=out)
    elif a.is_cuda:
        torch.mm(a.t(), b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float().t(), b.float(), out=out)
