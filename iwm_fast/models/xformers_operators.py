"""The operators that xformers chooses for packed attention, for logs."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["dispatched"]


def dispatched(device: torch.device, head: int = 64, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return xformers' forward and backward operators, and why flash-attention 3 is not among them."""
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q = torch.empty(1, 256, 2, head, device=device, dtype=dtype)
    given = fmha.Inputs(query=q, key=q, value=q, attn_bias=BlockDiagonalMask.from_seqlens([128, 128], device=device))
    try:
        forward: Any = dispatch._dispatch_fw(given, True)  # noqa: SLF001  (it has no public question)
        backward: Any = dispatch._dispatch_bw(given, forward.VARLEN_LSE_PACKED)  # noqa: SLF001
    except NotImplementedError:
        return "no operator of it works here"
    chosen = f"{forward.NAME} and {backward.NAME}"
    if forward is fmha.flash3.FwOp:
        return chosen
    reasons = fmha.flash3.FwOp.not_supported_reasons(given)
    return f"{chosen} (its flash-attention 3 is not used: {reasons[0] if reasons else 'another one goes first'})"
