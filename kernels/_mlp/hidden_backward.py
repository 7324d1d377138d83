"""Both matmuls of the MLP's hidden layer in the backward pass, and the activation's derivative between them."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.jit import dot, gelu_and_slope, place_of_program
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

__all__ = ["hidden_backward", "hidden_backward_kernel"]


@triton.jit
@no_type_check
def _finish_hidden(
    u, d, bias_ptr, image_ptr, hidden, dhidden, n0, h0, N, H, stride_bi, stride_hn,
    TMA: tl.constexpr, PER_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Epilogue of hidden_backward_kernel for a piece of a tile."""
    u += bias_of_tile(bias_ptr, image_ptr, n0, h0, N, H, stride_bi, PER_IMAGE, BLOCK_N, BLOCK_M)
    active, slope = gelu_and_slope(u, ACTIVATION)
    store_tile(hidden, active, n0, h0, N, H, stride_hn, TMA, DTYPE, BLOCK_N, BLOCK_M)
    store_tile(dhidden, d * slope, n0, h0, N, H, stride_hn, TMA, DTYPE, BLOCK_N, BLOCK_M)


@triton.jit
@no_type_check
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
    if TMA:  # one loop for both, with operands that are zero past D or Do
        for k in range(0, tl.maximum(D, DO), BLOCK_K):
            u = dot(x.load([n0, k]), w_in.load([h0, k]).T, u, PRECISION)
            d = dot(dout.load([n0, k]), w_out.load([k, h0]), d, PRECISION)
    else:
        u = add_product(
            x, w_in, u, n0, h0, N, H, D, stride_xn, stride_wih, stride_wid,
            True, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        d = add_product(
            dout, w_out, d, n0, h0, N, H, DO, stride_dn, stride_woh, stride_woo,
            False, EVEN_K, PRECISION, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if HAS_ACTION:
        u = add_action(
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
@no_type_check
def hidden_backward_kernel(
    x, w_in, bias_ptr, action_ptr, w_action_ptr, image_ptr, dout, w_out, hidden, dhidden,
    N, H, D, DO, A, PROGRAMS,
    stride_xn, stride_wih, stride_wid, stride_bi, stride_ai, stride_wah, stride_dn, stride_woh, stride_woo, stride_hn,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_K: tl.constexpr,
    PER_IMAGE: tl.constexpr, HAS_ACTION: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden = act(u) and dhidden = (dout · w_out) ∘ act'(u), with u = x · w_inᵀ + bias + action · w_actionᵀ, (N, H).

    x (N, D), w_in (H, D), dout (N, Do), w_out (Do, H) by its transpose's strides. u is recomputed.
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


def hidden_backward(
    x: Tensor, w_in: Tensor, bias: Bias, dout: Tensor, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return act(u) and (dout · w_out) ∘ act'(u), with u = x · w_inᵀ + bias, both (N, H) of x's dtype.

    x (N, D), w_in (H, D), dout (N, Do), w_out (Do, H).
    """
    rows, units = x.shape[0], w_in.shape[0]
    hidden, dhidden = (torch.empty(rows, units, dtype=x.dtype, device=x.device) for _ in range(2))
    layout = layout_of(x, w_in, dout, w_out, hidden, dhidden)

    def call(choice: Choice) -> tuple[Tensor, Tensor]:
        if choice.by == "library":
            torch.mm(x, w_in.t(), out=hidden)
            torch.mm(dout, w_out, out=dhidden)
            activate(hidden, dhidden, bias, activation)
            return hidden, dhidden
        tma = choice.by == "tma"
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        programs = grid_of(x.device, triton.cdiv(rows, n) * triton.cdiv(units, m), persistent=tma)
        even, piece = x.shape[1] % k == 0 and dout.shape[1] % k == 0, m // choice.pieces
        hidden_backward_kernel[(programs,)](
            x=descriptor(x, n, k) if tma else x, w_in=descriptor(w_in, m, k) if tma else w_in,
            bias_ptr=bias.row, action_ptr=bias.action, w_action_ptr=bias.w_action, image_ptr=bias.image,
            dout=descriptor(dout, n, k) if tma else dout, w_out=descriptor(w_out, k, m) if tma else w_out,
            hidden=descriptor(hidden, n, piece) if tma else hidden,
            dhidden=descriptor(dhidden, n, piece) if tma else dhidden,
            N=rows, H=units, D=x.shape[1], DO=dout.shape[1],
            A=0 if bias.action is None else bias.action.shape[1], PROGRAMS=programs,
            stride_xn=x.stride(0), stride_wih=w_in.stride(0), stride_wid=w_in.stride(1), stride_bi=units,
            stride_ai=0 if bias.action is None else bias.action.stride(0),
            stride_wah=0 if bias.w_action is None else bias.w_action.stride(0),
            stride_dn=dout.stride(0), stride_woh=w_out.stride(1), stride_woo=w_out.stride(0), stride_hn=units,
            TMA=tma, PERSISTENT=tma, EVEN_K=even,
            PER_IMAGE=bias.kind == "image", HAS_ACTION=bias.action is not None,
            ACTIVATION=activation_kind(activation, x.dtype), DTYPE=TRITON_TYPES[x.dtype], PRECISION=precision(),
            PIECES=choice.pieces,
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, BLOCK_A=BLOCK_A, GROUP=GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return hidden, dhidden

    about = f"{layout} {bias.kind}"
    return tuner(x.device).run("hidden_backward", x.dtype, (rows, units, x.shape[1]), call, about)
