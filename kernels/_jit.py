"""Triton functions that the kernels share, and the one place that knows Triton's interpreter.

With TRITON_INTERPRET=1 kernels run on the CPU, in NumPy, where bf16 is stored as 16-bit integers: a product or a sum of
them multiplies and adds the raw bits, and a conversion from fp32 cuts instead of rounding (Triton 3.6 to 3.8). So every
value is taken to fp32 right after its load, products go through `dot`, and results are rounded by `to_type`.

Vocabulary of the kernels: i_ a program's number, o_ offsets, m_ masks, p_ pointers, b_ blocks of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "dot", "gelu", "gelu_slope", "place_of_program", "to_e4m3", "to_type"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b with an fp32 accumulator; PRECISION concerns fp32 operands only ("ieee" or "tf32")."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def to_type(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, rounded to nearest even everywhere."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # noqa: PLR0124  (false for NaN, whose bits must stay)
    return x.to(DTYPE)


@triton.jit
def to_e4m3(x):
    """fp32 of at most 448 to the bits of the nearest e4m3, uint8; NaN is 0x7F, its sign free."""
    if INTERPRETED:  # which cuts, as for bf16
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # From 2⁻⁶ on the exponent is less by 120, and 20 of the 23 bits of the mantissa are rounded away; below, where
        # steps are 2⁻⁹, as are those of fp32 at 2¹⁴, the sum with that is rounded to them.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
        code = tl.where(x == x, code, 0x7F)  # noqa: PLR0124  (false for NaN)
        code = (code | (bits >> 31 << 7)).to(tl.uint8)
    else:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def gelu(u, TANH: tl.constexpr):
    """GELU of fp32 values: exact, u · Φ(u), or Hendrycks and Gimpel's tanh form, written with a sigmoid."""
    if TANH:
        value = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))  # 2 · √(2/π)
    else:
        value = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    return value


@triton.jit
def gelu_slope(u, TANH: tl.constexpr):
    """Derivative of `gelu` at fp32 values."""
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * u * u)  # 3 · 0.044715
        slope = s + u * s * (1.0 - s) * inner
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)  # 1 / √(2π)
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density
    return slope


@triton.jit
def place_of_program(i, ROWS, COLS, GROUP: tl.constexpr):
    """(row, column) of program i in a grid of ROWS × COLS blocks, GROUP rows at a time down each column.

    Programs that run together then share rows of one operand and columns of the other in L2.
    """
    in_group = GROUP * COLS
    first = (i // in_group) * GROUP
    rows = min(ROWS - first, GROUP)
    return first + (i % in_group) % rows, (i % in_group) // rows
