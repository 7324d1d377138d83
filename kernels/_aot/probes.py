"""Tiny kernels that are compiled and never launched, to count GELU's instructions in the machine code."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from iwm_fast.kernels._lib.jit import gelu, gelu_and_slope, to_type

__all__ = ["gelu_and_slope_probe", "gelu_probe"]


@triton.jit
@no_type_check
def gelu_probe(u_ptr, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out = gelu(u), or u if KIND is "none"."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + o).to(tl.float32)
    if KIND != "none":
        u = gelu(u, KIND)
    tl.store(out_ptr + o, to_type(u, out_ptr.dtype.element_ty))


@triton.jit
@no_type_check
def gelu_and_slope_probe(u_ptr, d_ptr, out_ptr, dout_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out = gelu(u) and dout = d · gelu'(u), or u and d · u if KIND is "none"."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + o).to(tl.float32)
    d = tl.load(d_ptr + o).to(tl.float32)
    slope = u
    if KIND != "none":
        u, slope = gelu_and_slope(u, KIND)
    tl.store(out_ptr + o, to_type(u, out_ptr.dtype.element_ty))
    tl.store(dout_ptr + o, to_type(d * slope, dout_ptr.dtype.element_ty))
