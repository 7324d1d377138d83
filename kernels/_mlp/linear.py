"""out = [residual +] act( x · wᵀ + bias + action[image of row] · w_actionᵀ ), by Triton, or by cuBLAS if faster."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.jit import dot, gelu, place_of_program
from iwm_fast.kernels._tuning.candidates import Choice
from iwm_fast.kernels._tuning.tuner import tuner

from .activate import activate
from .operands import (
    BLOCK_A,
    GROUP,
    TRITON_TYPES,
    Bias,
    activation_kind,
    descriptor,
    grid_of,
    layout_of,
    precision,
)
from .tiles import add_action, add_product, bias_of_tile, store_tile

__all__ = ["linear", "linear_kernel"]


@triton.jit
@no_type_check
def _finish(
    acc, bias_ptr, image_ptr, residual, out, n0, m0, N, M, stride_bi, stride_rn, stride_on,
    TMA: tl.constexpr, HAS_BIAS: tl.constexpr, PER_IMAGE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Epilogue of a piece of a tile: bias, activation, residual, store."""
    if HAS_BIAS:
        acc += bias_of_tile(bias_ptr, image_ptr, n0, m0, N, M, stride_bi, PER_IMAGE, BLOCK_N, BLOCK_M)
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
    store_tile(out, acc, n0, m0, N, M, stride_on, TMA, DTYPE, BLOCK_N, BLOCK_M)


@triton.jit
@no_type_check
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
        acc = add_product(
            x, w, acc, n0, m0, N, M, K, stride_xn, stride_wm, stride_wk,
            ALONG_K, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if HAS_ACTION:
        acc = add_action(
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
@no_type_check
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


def linear(
    x: Tensor, w: Tensor, bias: Bias | None, out: Tensor, *, residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """Write out (N, M) = [residual +] act( x · wᵀ + bias ) and return it; x (N, K), w (M, K) of any strides."""
    along = w.stride(1) == 1
    stored = w if along else w.t()  # with contiguous rows
    product = "hidden" if activation is not None else "plain" if bias is None and residual is None else "project"
    layout = layout_of(x, stored, residual, out)

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            return _library_linear(x, w, bias, out, residual, activation)
        tma = choice.by == "tma"
        rows, columns = out.shape
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        tiles = triton.cdiv(rows, n) * triton.cdiv(columns, m)
        programs = grid_of(x.device, tiles, persistent=tma)
        piece = m // choice.pieces
        action = None if bias is None else bias.action
        linear_kernel[(programs,)](
            x=descriptor(x, n, k) if tma else x,
            w=(descriptor(stored, m, k) if along else descriptor(stored, k, m)) if tma else w,
            bias_ptr=None if bias is None else bias.row,
            action_ptr=action, w_action_ptr=None if bias is None else bias.w_action,
            image_ptr=None if bias is None else bias.image,
            residual=descriptor(residual, n, piece) if tma and residual is not None else residual,
            out=descriptor(out, n, piece) if tma else out,
            N=rows, M=columns, K=x.shape[1], A=0 if action is None else action.shape[1], PROGRAMS=programs,
            stride_xn=x.stride(0), stride_wm=w.stride(0), stride_wk=w.stride(1), stride_bi=columns,
            stride_ai=0 if action is None else action.stride(0),
            stride_wam=0 if bias is None or bias.w_action is None else bias.w_action.stride(0),
            stride_rn=0 if residual is None else residual.stride(0), stride_on=out.stride(0),
            TMA=tma, PERSISTENT=tma, ALONG_K=along, EVEN_K=x.shape[1] % k == 0,
            HAS_BIAS=bias is not None, PER_IMAGE=bias is not None and bias.kind == "image",
            HAS_ACTION=action is not None, HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation_kind(activation, out.dtype), DTYPE=TRITON_TYPES[out.dtype], PRECISION=precision(),
            PIECES=choice.pieces,
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, BLOCK_A=BLOCK_A, GROUP=GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return out

    about = f"{layout} {bias.kind if bias else 'plain'}{' residual' if residual is not None else ''}"
    return tuner(x.device).run(product, x.dtype, (*out.shape, x.shape[1]), call, about)


def _library_linear(
    x: Tensor, w: Tensor, bias: Bias | None, out: Tensor, residual: Tensor | None, activation: str | None
) -> Tensor:
    if activation is not None and bias is not None:
        torch.mm(x, w.t(), out=out)
        activate(out, None, bias, activation)
    elif out.dtype != x.dtype:
        out.copy_(torch.mm(x, w.t(), out_dtype=out.dtype) if x.is_cuda else torch.mm(x.float(), w.float().t()))
    elif residual is not None:
        torch.addmm(residual, x, w.t(), out=out)
        if bias is not None:
            out += bias.row
    elif bias is not None:
        torch.addmm(bias.row, x, w.t(), out=out)
    else:
        torch.mm(x, w.t(), out=out)
    return out
