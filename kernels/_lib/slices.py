"""Sums of partial sums in a fixed order, the second stage of each reduction: equal inputs give equal bits."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import to_type

__all__ = ["add_gradients", "add_pairs", "add_slices", "add_slices_kernel"]


@triton.jit(do_not_specialize=["SLICES"])
@no_type_check
def add_slices_kernel(
    slices_ptr, out_ptr, second_ptr,
    SLICES, L, SPLIT,
    HAS_SECOND: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (SPLIT,) and second (L − SPLIT,), one after the other, = Σ slices (SLICES, L) fp32, in their order.

    ACCUMULATE: out, fp32, is the sum's first term; without a second.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < L
    acc = tl.load(out_ptr + o, mask=m, other=0.0) if ACCUMULATE else tl.zeros((BLOCK,), tl.float32)
    p_slice = slices_ptr + o
    for _ in range(SLICES):
        acc += tl.load(p_slice, mask=m, other=0.0)
        p_slice += L
    value = to_type(acc, out_ptr.dtype.element_ty)
    if HAS_SECOND:
        tl.store(second_ptr + o - SPLIT, value, mask=m & (o >= SPLIT))
    tl.store(out_ptr + o, value, mask=m & (o < SPLIT))


def add_slices(slices: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """Return Σ of fp32 slices (S, ...) in their order, rounded once to `dtype`: (...).

    into: fp32 (...), contiguous, the sum's first term; it is overwritten with the sum and returned.
    """
    if into is not None:
        assert dtype == into.dtype == torch.float32
        _add_slices(slices, into, None, accumulate=True)
        return into
    out = torch.empty(slices.shape[1:], dtype=dtype, device=slices.device)
    _add_slices(slices, out, None)
    return out


def add_pairs(slices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`add_slices` of slices (S, 2, D), returned as two tensors (D,)."""
    first, second = (torch.empty(slices.shape[2], dtype=dtype, device=slices.device) for _ in range(2))
    _add_slices(slices, first, second)
    return first, second


def add_gradients(slices: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`add_slices` of slices (S, P · Q [+ P]), returned as tensors like weight (P, Q) and bias (P,)."""
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    _add_slices(slices, dweight, dbias)
    return dweight, dbias


def _add_slices(slices: Tensor, out: Tensor, second: Tensor | None, *, accumulate: bool = False) -> None:
    length = out.numel() + (0 if second is None else second.numel())
    if length:
        add_slices_kernel[(triton.cdiv(length, 1024),)](
            slices_ptr=slices, out_ptr=out, second_ptr=second, SLICES=slices.shape[0], L=length, SPLIT=out.numel(),
            HAS_SECOND=second is not None, ACCUMULATE=accumulate, BLOCK=1024, num_warps=4,
        )  # fmt: skip
