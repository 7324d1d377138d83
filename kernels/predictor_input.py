"""The predictor's packed tokens, each written once to its position: no sum or concatenation in memory before.

    out[place[v]] = context[v] + position[context_patches[v]]            v < Nc
                    mask_token + position[predicted_patches[v − Nc]]     Nc ≤ v < Nc + Nt, with a mask token
                    rows[v − Nc − Nt]                                    after them, unchanged

context (Nc, D); position (L, D), a table without gradient; mask_token (D,) with predicted_patches int64 (Nt,), or
neither; rows (No, D) or None: tokens that already have positions, or need none; place int64 (N,), a permutation of the
N = Nc + Nt + No tokens. Sums are fp32, rounded once to context's dtype.

Fused (Triton): both additions, the gathers of positions, the concatenation and the permutation. The backward pass reads
the gradient by `place` once and writes those of context and rows; it sums the mask token's at the same time, in fp32
and two ordered stages: equal inputs give equal bits.

Reference (plain PyTorch, below): gathers, additions, a concatenation and a permutation.

FLOPs and bytes: `predictor_input_flops`, `predictor_input_bytes`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import autocast_type, resolve_backend, without_autocast
from ._lib.checks import check_floating, check_index, check_like, check_shape, looked_at
from ._lib.jit import to_type
from ._lib.rows import launching, rows_a_sum, rows_together
from .permutation import invert, take_rows

__all__ = ["predictor_input", "predictor_input_bytes", "predictor_input_flops", "predictor_input_reference"]

_INDEX = 8  # bytes of an int64
_BLOCK_N = 16


def predictor_input_flops(context: int, masked: int, width: int, *, backward: bool = False) -> int:
    """Return FLOPs: an addition per element of context and mask tokens; backward, per element of the latter's sum."""
    return (masked if backward else context + masked) * width


def predictor_input_bytes(
    context: int, masked: int, rows: int, width: int, *, backward: bool = False, element: int = 2
) -> int:
    """Return minimum bytes moved by one pass: each row read and written once; mask tokens only written, or only read.

    The table of positions stays in L2 and is not counted; the indices are.
    """
    moved = (2 * (context + rows) + masked) * width * element
    indices = (context + masked + rows) * _INDEX + (0 if backward else (context + masked) * _INDEX)
    return moved + indices


def predictor_input_reference(
    context: Tensor,
    context_patches: Tensor,
    position: Tensor,
    place: Tensor,
    *,
    mask_token: Tensor | None = None,
    predicted_patches: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Compute `predictor_input` with PyTorch's operators. Arguments are not checked."""
    parts = [context + position.index_select(0, context_patches)]
    if mask_token is not None and predicted_patches is not None:
        parts.append(mask_tokens(mask_token, position, predicted_patches))
    if rows is not None:
        parts.append(rows)
    return take_rows(torch.cat(parts), invert(place), place)


def mask_tokens(mask_token: Tensor, position: Tensor, patches: Tensor) -> Tensor:
    """Return the mask token (D,) plus its position (L, D), without gradient, at each of the patches int64 (N,): (N, D).

    The addition follows the gather, so that the token's gradient is an ordered sum over all rows, in fp32 or better. If
    a sum were gathered, its gradient would be added by atomics, row by row, in the tokens' dtype.
    """
    return position.detach().index_select(0, patches) + mask_token


@triton.jit(
    do_not_specialize=["N", "CONTEXT", "PLACED", "L", "context_patches_ptr", "predicted_patches_ptr", "place_ptr"]
)
@no_type_check
def assemble_kernel(
    context_ptr, context_patches_ptr, position_ptr, place_ptr, mask_token_ptr, predicted_patches_ptr, rows_ptr, out_ptr,
    N, CONTEXT, PLACED, L, D,
    stride_cn, stride_pl, stride_rn, stride_on,
    HAS_MASK: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[place[v]] (N, D): up to CONTEXT context[v], up to PLACED the mask token, each plus its position; then rows.

    A position (L, D) out of range counts as NaN; a token whose place is out of range is not written.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    tokens = o_n.to(tl.int64)
    m_context = o_n < CONTEXT
    p_context = context_ptr + tokens[:, None] * stride_cn + o_d[None, :]
    value = tl.load(p_context, mask=m_context[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
    patch = tl.load(context_patches_ptr + tokens, mask=m_context, other=0)
    if HAS_MASK:
        m_mask = (o_n >= CONTEXT) & (o_n < PLACED)
        patch += tl.load(predicted_patches_ptr + tokens - CONTEXT, mask=m_mask, other=0)
        b_mask = tl.load(mask_token_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        value += tl.where(m_mask[:, None], b_mask[None, :], 0.0)
    m_placed = o_n < PLACED
    m_known = (patch >= 0) & (patch < L)
    p_position = position_ptr + patch[:, None] * stride_pl + o_d[None, :]
    value += tl.load(p_position, mask=(m_placed & m_known)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    value = tl.where((m_known | (o_n >= PLACED))[:, None], value, float("nan"))
    if HAS_ROWS:
        m_rows = (o_n >= PLACED) & m_n
        p_rows = rows_ptr + (tokens - PLACED)[:, None] * stride_rn + o_d[None, :]
        value += tl.load(p_rows, mask=m_rows[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    place = tl.load(place_ptr + tokens, mask=m_n, other=-1)
    m_out = (place >= 0) & (place < N)
    p_out = out_ptr + place[:, None] * stride_on + o_d[None, :]
    tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m_out[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["N", "CONTEXT", "PLACED", "ROWS", "place_ptr"])
@no_type_check
def assemble_backward_kernel(
    dout_ptr, place_ptr, dcontext_ptr, drows_ptr, sums_ptr,
    N, CONTEXT, PLACED, D, ROWS,
    stride_gn, stride_cn, stride_rn,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dcontext and drows, which are dout (N, D) at their places; sums fp32 (programs, D) of the mask tokens'.

    A program takes ROWS tokens, a multiple of BLOCK_N, in their order.
    """
    i = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # one sum per row of the block, added up after the loop
    for first in range(i * ROWS, min(i * ROWS + ROWS, N), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        tokens = o_n.to(tl.int64)
        place = tl.load(place_ptr + tokens, mask=o_n < N, other=-1)
        m_in = ((place >= 0) & (place < N))[:, None] & m_d[None, :]
        grad = tl.load(dout_ptr + place[:, None] * stride_gn + o_d[None, :], mask=m_in, other=0.0)  # (BLOCK_N, BLOCK_D)
        p_context = dcontext_ptr + tokens[:, None] * stride_cn + o_d[None, :]
        tl.store(p_context, grad, mask=(o_n < CONTEXT)[:, None] & m_d[None, :])
        p_rows = drows_ptr + (tokens - PLACED)[:, None] * stride_rn + o_d[None, :]
        tl.store(p_rows, grad, mask=((o_n >= PLACED) & (o_n < N))[:, None] & m_d[None, :])
        if HAS_MASK:
            m_mask = (o_n >= CONTEXT) & (o_n < PLACED)
            acc += tl.where(m_mask[:, None], grad.to(tl.float32), 0.0)
    if HAS_MASK:
        tl.store(sums_ptr + i.to(tl.int64) * D + o_d, tl.sum(acc, axis=0), mask=m_d)


def launch_assembly(
    context: Tensor, context_patches: Tensor, position: Tensor, place: Tensor, mask_token: Tensor | None,
    predicted_patches: Tensor | None, rows: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Launch `assemble_kernel`, which writes out (N, D)."""
    context, position = rows_together(context), rows_together(position)
    rows = None if rows is None else rows_together(rows)
    width, block_d = context.shape[1], _columns(context.shape[1])
    with launching(context):
        assemble_kernel[(triton.cdiv(len(place), _BLOCK_N), triton.cdiv(width, block_d))](
            context_ptr=context, context_patches_ptr=rows_together(context_patches), position_ptr=position,
            place_ptr=rows_together(place), mask_token_ptr=None if mask_token is None else rows_together(mask_token),
            predicted_patches_ptr=None if predicted_patches is None else rows_together(predicted_patches),
            rows_ptr=rows, out_ptr=out,
            N=len(place), CONTEXT=len(context), PLACED=len(context) + _count(predicted_patches), L=len(position),
            D=width,
            stride_cn=context.stride(0), stride_pl=position.stride(0), stride_rn=0 if rows is None else rows.stride(0),
            stride_on=out.stride(0),
            HAS_MASK=mask_token is not None, HAS_ROWS=rows is not None,
            BLOCK_N=_BLOCK_N, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip


def launch_assembly_backward(
    grad: Tensor, place: Tensor, dcontext: Tensor, drows: Tensor, masked: int
) -> Tensor | None:
    """Launch `assemble_backward_kernel`: write dcontext and drows, return the mask token's gradient, fp32 (D,)."""
    grad = rows_together(grad)
    count, width = grad.shape
    block_d = _columns(width)
    depth = rows_a_sum(count, _BLOCK_N)
    programs = triton.cdiv(count, depth)
    sums = torch.empty(programs, width, dtype=torch.float32, device=grad.device) if masked else None
    with launching(grad):
        assemble_backward_kernel[(programs, triton.cdiv(width, block_d))](
            dout_ptr=grad, place_ptr=rows_together(place), dcontext_ptr=dcontext, drows_ptr=drows, sums_ptr=sums,
            N=count, CONTEXT=len(dcontext), PLACED=len(dcontext) + masked, D=width, ROWS=depth,
            stride_gn=grad.stride(0), stride_cn=dcontext.stride(0), stride_rn=drows.stride(0),
            HAS_MASK=masked > 0,
            BLOCK_N=_BLOCK_N, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return None if sums is None else sums.sum(dim=0)


def _columns(width: int) -> int:
    return min(128, max(16, triton.next_power_of_2(width)))


def _count(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.shape[0]


@torch.library.custom_op("iwm_fast::predictor_input", mutates_args=())
def _operator(
    context: Tensor, context_patches: Tensor, position: Tensor, place: Tensor, mask_token: Tensor | None,
    predicted_patches: Tensor | None, rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the packed tokens, (N, D)."""
    out = torch.empty(place.shape[0], context.shape[1], dtype=context.dtype, device=context.device)
    if out.numel():
        launch_assembly(context, context_patches, position, place, mask_token, predicted_patches, rows, out)
    return out


@_operator.register_fake
def _(context: Tensor, context_patches: Tensor, position: Tensor, place: Tensor, *_: Any) -> Tensor:
    return context.new_empty(place.shape[0], context.shape[1])


@torch.library.custom_op("iwm_fast::predictor_input_backward", mutates_args=())
def _backward_operator(grad: Tensor, place: Tensor, context: int, masked: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of context (Nc, D), of the mask token (D,), and of rows (No, D)."""
    width = grad.shape[1]
    dcontext = torch.empty(context, width, dtype=grad.dtype, device=grad.device)
    drows = torch.empty(grad.shape[0] - context - masked, width, dtype=grad.dtype, device=grad.device)
    dmask = launch_assembly_backward(grad, place, dcontext, drows, masked) if grad.numel() else None
    return dcontext, grad.new_zeros(width) if dmask is None else dmask.to(grad.dtype), drows


@_backward_operator.register_fake
def _(grad: Tensor, place: Tensor, context: int, masked: int) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[1]
    rows = grad.shape[0] - context - masked
    return grad.new_empty(context, width), grad.new_empty(width), grad.new_empty(rows, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, _, _, place, mask_token, predicted_patches, rows = inputs
    ctx.sizes = (context.shape[0], 0 if mask_token is None else predicted_patches.shape[0])
    ctx.has_mask, ctx.has_rows = mask_token is not None, rows is not None
    ctx.save_for_backward(place)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (place,) = ctx.saved_tensors
    dcontext, dmask, drows = torch.ops.iwm_fast.predictor_input_backward(grad, place, *ctx.sizes)
    return dcontext, None, None, None, dmask if ctx.has_mask else None, None, drows if ctx.has_rows else None


_operator.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.iwm_fast.predictor_input)
def _forward_flops(
    context: Any, _: Any, __: Any, ___: Any, mask_token: Any, patches: Any, *____: Any, **_____: Any
) -> int:
    return predictor_input_flops(context[0], 0 if mask_token is None else patches[0], context[1])


@register_flop_formula(torch.ops.iwm_fast.predictor_input_backward)
def _backward_flops(grad: Any, _: Any, context: int, masked: int, **__: Any) -> int:
    return predictor_input_flops(context, masked, grad[1], backward=True)


def predictor_input(
    context: Tensor,
    context_patches: Tensor,
    position: Tensor,
    place: Tensor,
    *,
    mask_token: Tensor | None = None,
    predicted_patches: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the predictor's packed tokens: context and mask tokens plus positions, other rows as given.

    Args:
        context: (Nc, D), any floating dtype.
        context_patches: int64 (Nc,), the row of `position` for each.
        position: (L, D) of context's dtype; gets no gradient.
        place: int64 (N,), the row in the result of each token: first of the context, then of the mask tokens, then of
            `rows`. A permutation.
        mask_token: (D,) of context's dtype; needs predicted_patches.
        predicted_patches: int64 (Nt,), the row of `position` for each mask token.
        rows: (No, D) of context's dtype.
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else the reference.

    Values of the three index tensors are checked on the CPU only: elsewhere that would synchronise. On a GPU a row of
    positions out of range counts as NaN, and a token whose place is out of range is not written.

    Under autocast the floating arguments are cast to its dtype first, except float64.

    Returns:
        (N, D) of context's dtype, or of autocast's; N = Nc + Nt + No.

    Raises:
        ValueError: an argument has a wrong shape, dtype, value or device; the message begins with its name.

    """
    check_floating("context", context, 2)
    wanted = autocast_type(context)
    if wanted is not None:
        context, position = context.to(wanted), position.to(wanted)
        mask_token, rows = (None if t is None else t.to(wanted) for t in (mask_token, rows))
    check_parts(context, context_patches, position, place, mask_token, predicted_patches, rows)
    if resolve_backend(backend, "context", context) == "triton":
        out: Tensor = torch.ops.iwm_fast.predictor_input(
            context, context_patches, position.detach(), place, mask_token, predicted_patches, rows
        )
        return out
    with without_autocast(context):
        return predictor_input_reference(
            context,
            context_patches,
            position.detach(),
            place,
            mask_token=mask_token,
            predicted_patches=predicted_patches,
            rows=rows,
        )


def check_parts(
    context: Tensor, context_patches: Tensor, position: Tensor, place: Tensor, mask_token: Tensor | None,
    predicted_patches: Tensor | None, rows: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError unless the parts fit together and `place` has a row for each token."""
    width = context.shape[1]
    check_floating("position", position, 2)
    check_shape("position", position, (len(position), width), "(L, D)")
    check_like("position", position, "context", context)
    if (mask_token is None) != (predicted_patches is None):
        missing = "mask_token" if mask_token is None else "predicted_patches"
        raise ValueError(f"{missing} is missing; give mask_token and predicted_patches, or neither")
    if mask_token is not None:
        check_shape("mask_token", mask_token, (width,), "(D,)")
        check_like("mask_token", mask_token, "context", context)
    if rows is not None:
        check_floating("rows", rows, 2)
        check_shape("rows", rows, (len(rows), width), "(No, D)")
        check_like("rows", rows, "context", context)
    masked, positions = _count(predicted_patches), len(position)
    check_index("context_patches", context_patches, len(context), "(Nc,)", "position", position, positions)
    if predicted_patches is not None:
        check_index("predicted_patches", predicted_patches, masked, "(Nt,)", "position", position, positions)
    total = len(context) + masked + _count(rows)
    check_index("place", place, total, "(N,) = (Nc + Nt + No,)", "the result", context, total)
    if looked_at(place) and (np.bincount(place.numpy(), minlength=total) != 1).any():
        raise ValueError(f"place names a row twice; it must name each of 0 to {total - 1} once")
