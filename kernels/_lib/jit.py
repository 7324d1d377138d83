"""Triton functions that several kernels share, and everything that is specific to Triton's interpreter.

With TRITON_INTERPRET=1 kernels run on the CPU in NumPy, where bf16 is stored as 16-bit integers: arithmetic on it would
use the raw bits, and a conversion from fp32 truncates instead of rounding (Triton 3.6 to 3.8). So every value is
converted to fp32 right after its load, matmuls go through `dot`, and results are rounded by `to_type`.

Triton compiles a kernel again when an integer is 1 or a multiple of 16, or a pointer is 16-byte aligned, and it was not
before. `do_not_specialize` excludes what changes from step to step (numbers of rows, tokens, images and programs, and
pointers to indices, which start anywhere in a packed upload): no vector load depends on these. Widths, strides and the
other pointers are specialised, because 16-byte loads depend on them.

Naming: i_ program ids, o_ offsets, m_ masks, p_ pointers, b_ blocks of values.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "dot", "gelu", "gelu_and_slope", "ones", "place_of_program", "to_e4m3", "to_type"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a · b with an fp32 accumulator. PRECISION applies to fp32 operands ("ieee" or "tf32")."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
@no_type_check
def ones(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Return a block of ones, as an operand of `dot`."""
    return tl.full((ROWS, COLUMNS), 1.0, tl.float32 if INTERPRETED else DTYPE)


@triton.jit
@no_type_check
def to_type(x, DTYPE: tl.constexpr):
    """Convert fp32 to DTYPE, rounding to nearest even on the GPU and in the interpreter."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # noqa: PLR0124  (false for NaN, whose bits must stay)
    return x.to(DTYPE)


@triton.jit
@no_type_check
def to_e4m3(x):
    """Convert fp32 of at most 448 to the bits of the nearest e4m3, uint8; NaN becomes 0x7F or 0xFF."""
    if INTERPRETED:  # which truncates, as for bf16
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # From 2⁻⁶ up, the exponent bias is 120 less, and 20 of the 23 mantissa bits are rounded away. Below, steps are
        # 2⁻⁹, as fp32's are at 2¹⁴: adding 2¹⁴ rounds to them.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
        code = tl.where(x == x, code, 0x7F)  # noqa: PLR0124  (false for NaN)
        code = (code | (bits >> 31 << 7)).to(tl.uint8)
    else:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit
@no_type_check
def _rcp(x):
    """Return 1 / x to one unit in the last place: one instruction, where a division takes ten."""
    if INTERPRETED:
        value = 1.0 / x
    else:
        value = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return value


@triton.jit
@no_type_check
def _exp2(x):
    """Return 2 to the x to two units in the last place: one instruction; results below 2⁻¹²⁶ may become 0."""
    if INTERPRETED:
        value = tl.exp2(x)
    else:
        value = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return value


@triton.jit
@no_type_check
def _tanh(x):
    """Return tanh to 2⁻¹¹: one instruction, for results that are rounded to bf16."""
    if INTERPRETED:
        value = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        value = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return value


@triton.jit
@no_type_check
def _upper_tail(u):
    """Return |u|, 1 − Φ(|u|) and exp(−u² / 2), fp32. NaN stays NaN; |u| is clamped to 2¹⁴, so infinity gives no NaN.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, with t = 1 / (1 + p |u| / √2), p = 0.3275911, and
    halved coefficients: its error of 1.5e-7 is a thousandth of the rounding error of half precision.
    """
    size = tl.minimum(tl.abs(u), 16384.0, propagate_nan=tl.PropagateNan.ALL)
    t = _rcp(size * 0.2316418882663604 + 1.0)
    density = _exp2(size * size * -0.7213475204444817)  # log₂(e) / 2
    tail = t * 0.5307027145 - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = tail * t + 0.127414796
    return size, tail * t * density, density


@triton.jit
@no_type_check
def gelu(u, KIND: tl.constexpr):
    """Return GELU of fp32 values.

    KIND: "erf", u · Φ(u) exactly; "rational", its approximation for half-precision results; "tanh", Hendrycks and
    Gimpel's form, written with a sigmoid; "tanh_approx", its approximation for bf16 results.
    """
    if KIND == "erf":
        value = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif KIND == "rational":
        size, tail, _ = _upper_tail(u)
        value = tl.maximum(u, 0.0) - size * tail  # u − u · tail above 0, u · tail below it
    elif KIND == "tanh":
        value = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))  # 2 · √(2/π)
    else:
        half = 0.5 * u
        value = half + half * _tanh(u * (0.7978845608028654 + 0.035677408136300125 * u * u))
    return value


@triton.jit
@no_type_check
def gelu_and_slope(u, KIND: tl.constexpr):
    """Return GELU of fp32 values, as `gelu` computes it, and its derivative."""
    if KIND == "rational":
        _, tail, density = _upper_tail(u)
        phi = tl.where(u >= 0.0, 1.0 - tail, tail)
        value = u * phi
        slope = phi + u * density * 0.3989422804014327  # 1 / √(2π); NaN at infinity, so that gradients show it
    elif KIND == "erf":
        phi = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        value = u * phi
        slope = phi + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        inner = u * (0.7978845608028654 + 0.035677408136300125 * u * u)  # √(2/π), and 0.044715 of it
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0 if KIND == "tanh" else _tanh(inner)
        half = 0.5 * u
        value = half + half * t
        slope = 0.5 + 0.5 * t + half * (1.0 - t * t) * (0.7978845608028654 + 0.10703222440890037 * u * u)
    return value, slope


@triton.jit
@no_type_check
def place_of_program(i, ROWS, COLS, GROUP: tl.constexpr):
    """Return (row, column) of program i in a grid of ROWS × COLS blocks, GROUP rows at a time down each column.

    Programs that run together then share rows of one operand and columns of the other in L2.
    """
    in_group = GROUP * COLS
    first = (i // in_group) * GROUP
    rows = min(ROWS - first, GROUP)
    return first + (i % in_group) % rows, (i % in_group) // rows
