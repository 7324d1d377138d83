"""Rows quantised to e4m3 with one scale each, as operands of fp8 matmuls, in one kernel.

    scale[n] = the least 2ᵏ with max |v[n]| ≤ 448 · 2ᵏ,  code[n] = v[n] / scale[n] to the nearest e4m3, v = [gelu](x)

x (N, D); code (N, D) float8_e4m3fn, 1 sign, 4 exponent and 3 mantissa bits, largest value 448 (Micikevicius et al.,
arXiv:2209.05433); scale (N, 1) fp32. Scales are powers of two, so scaling rounds nothing, and bf16 holds code · scale
exactly. e4m3 has no infinity: values that are not finite become NaN. There is no gradient.

Fused (Triton): activation, rounding to x's dtype, the row's maximum, scaling and rounding. Each element is read once
and its code written once, 3 bytes per element in bf16. The matmuls are the library's.

Reference (plain PyTorch, below): 13 bytes per element in bf16, 17 with GELU.

FLOPs and bytes: `e4m3_rows_flops`, `e4m3_rows_bytes`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import resolve_backend, without_autocast
from ._lib.checks import check_floating
from ._lib.jit import gelu, to_e4m3, to_type
from ._lib.rows import launching, pieces, rows_a_program, rows_together

__all__ = ["e4m3_rows", "e4m3_rows_bytes", "e4m3_rows_flops", "e4m3_rows_reference"]

_TYPE = torch.float8_e4m3fn
_LARGEST = 448.0
_LEAST = 2.0**-126  # fp32's smallest normal number: a row of zeros needs a scale whose reciprocal exists


def e4m3_rows_flops(rows: int, width: int) -> int:
    """Return FLOPs: a comparison and a multiplication per element; the activation is not counted."""
    return 2 * rows * width


def e4m3_rows_bytes(rows: int, width: int, *, element: int = 2) -> int:
    """Return minimum bytes moved: each element read once, its code and each row's scale written once."""
    return rows * (width * (element + 1) + 4)


def e4m3_rows_reference(x: Tensor, *, activation: str = "none") -> tuple[Tensor, Tensor]:
    """Compute `e4m3_rows` with PyTorch's operators. Arguments are not checked."""
    values = F.gelu(x) if activation == "gelu" else x
    largest = values.abs().amax(1, keepdim=True).float()
    fraction, exponent = torch.frexp(largest.clamp(min=_LARGEST * _LEAST))  # 448 is 0.875 · 2⁹
    scale = torch.exp2(exponent - 9 + (fraction > 0.875))
    # PyTorch's conversion on the CPU turns infinity into 448; a NaN factor prevents that. bf16 holds the reciprocals of
    # all scales, fp16 does not.
    inverse = (scale.reciprocal() + 0 * largest).to(torch.promote_types(x.dtype, torch.bfloat16))
    return (values * inverse).to(_TYPE).contiguous(), scale


@triton.jit(do_not_specialize=["N"])
@no_type_check
def e4m3_kernel(
    x_ptr, code_ptr, scale_ptr,
    N, D,
    stride_xn, stride_cn,
    HAS_GELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write code uint8 (N, D) of v / scale, v = [gelu](x); scale fp32 (N,), the least 2ᵏ with max |v| ≤ 448 · 2ᵏ."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)[:, None]
    values = ()
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m = m_n[:, None] & (o < D)[None, :]
        value = tl.load(x_ptr + rows * stride_xn + o[None, :], mask=m, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        if HAS_GELU:
            value = to_type(gelu(value, "erf"), x_ptr.dtype.element_ty).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=1))
        values = values + (value,)
    # 448 is 1.75 · 2⁸: a larger mantissa carries into the exponent. At least 2⁻¹²⁶, whose bits are 1 << 23.
    exponent = ((largest.to(tl.uint32, bitcast=True) + 0x1FFFFF) >> 23).to(tl.int32) - 8
    exponent = tl.maximum(exponent, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(scale_ptr + o_n, scale, mask=m_n)
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        value = values[part]
        # The conversion would turn infinity into 448.
        value = tl.where(tl.abs(value) < float("inf"), value * inverse, float("nan"))
        p_code = code_ptr + rows * stride_cn + o[None, :]
        tl.store(p_code, to_e4m3(value), mask=m_n[:, None] & (o < D)[None, :])


def launch_e4m3(x: Tensor, activation: str, codes: Tensor, scale: Tensor) -> None:
    """Launch `e4m3_kernel`: write codes uint8 (N, D) and scale fp32 (N,)."""
    rows, width = x.shape
    block_d, parts = pieces(width)
    block_n = rows_a_program(width, 2)
    e4m3_kernel[(triton.cdiv(rows, block_n),)](
        x_ptr=x, code_ptr=codes, scale_ptr=scale,
        N=rows, D=width,
        stride_xn=x.stride(0), stride_cn=codes.stride(0),
        HAS_GELU=activation == "gelu",
        BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("iwm_fast::e4m3_rows", mutates_args=())
def _operator(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return codes uint8 (N, D) and scale fp32 (N, 1)."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        with launching(x):
            launch_e4m3(rows_together(x), activation, codes, scale)
    return codes, scale


@_operator.register_fake
def _(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@register_flop_formula(torch.ops.iwm_fast.e4m3_rows)
def _count(x: Any, *_: Any, **__: Any) -> int:
    return e4m3_rows_flops(*x)


def e4m3_rows(x: Tensor, *, activation: str = "none", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise the rows of x, or of gelu(x), to e4m3 with one scale each.

    Args:
        x: (N, D), any floating dtype; N may be 0.
        activation: "none", or "gelu" (exact), rounded to x's dtype.
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else the reference. Triton
            needs a GPU with the type: capability 8.9 or newer.

    Autocast has no effect: x is read in its own dtype.

    Returns:
        Codes (N, D), float8_e4m3fn, and scale (N, 1), fp32. A value that is not finite becomes NaN, and the rest of its
        row is then meaningless. GELU in half precision may differ by one rounding between backends.

    Raises:
        ValueError: an argument does not fit, or x requires a gradient.

    """
    check_floating("x", x, 2)
    if not x.shape[1]:
        raise ValueError("x has no columns; its rows need at least one element")
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation is {activation!r}; it must be none or gelu")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires a gradient, and quantisation has none: call under torch.no_grad()")
    if resolve_backend(backend, "x", x) == "reference":
        with without_autocast(x):
            return e4m3_rows_reference(x, activation=activation)
    codes, scale = torch.ops.iwm_fast.e4m3_rows(x, activation)
    return codes.view(_TYPE), scale
