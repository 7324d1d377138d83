"""The empirical characteristic functions that SIGReg compares with a Gaussian's (LeJEPA, arXiv:2511.08544).

    cosines[j, k] = Σ_n cos(t_j · p[n, k]),  sines[j, k] = Σ_n sin(t_j · p[n, k]),  t_j = j · spacing, j = 1 … J

p (N, K) fp32, or float64: the N tokens projected on K directions. Rows from `rows` on, padding, add nothing. Result
(2, J, K), of p's type. t = 0 is left out: its sums are N and 0. Gradient:

    ∂/∂p[n, k] = Σ_j t_j · (sines'[j, k] · cos(t_j p) − cosines'[j, k] · sin(t_j p)),  x' the gradient of x

Fused (Triton): forward reads each number of p once and takes one sine and one cosine of it; those of multiples of the
angle come from the addition theorem, cos((j + 1) θ) = cos(jθ) cos θ − sin(jθ) sin θ, whose error grows with j, where
Chebyshev's recurrence has j². Programs add rows in fp32 and in a fixed order, and a second kernel adds the programs'
sums in theirs. Backward reads p again, does the same and writes the gradient. Nothing but p is saved. The projection,
a matmul in fp32, is the library's.

Reference (plain PyTorch, below): Chebyshev's recurrence forward and Clenshaw's backward, a few passes over p per knot.
On a CPU these are of so many rows at a time that they stay in a core's cache.

Operations and bytes: `sigreg_sums_flops`, `sigreg_sums_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import resolve_backend, without_autocast
from ._lib.checks import check_floating, check_like, check_shape
from ._lib.jit import INTERPRETED
from ._lib.once import once_differentiable
from ._lib.rows import SUM_PROGRAMS, launching, rows_together
from ._lib.slices import add_slices

__all__ = ["sigreg_sums", "sigreg_sums_bytes", "sigreg_sums_flops", "sigreg_sums_reference"]

# 4 warps hold 4 numbers of p a lane, beside them 2 sums per knot for each.
_BLOCK_N, _BLOCK_K = 4, 128
_BACKWARD_ROWS = 8
_IN_CACHE = 1 << 17  # numbers of p that the reference works on at a time on a CPU: six arrays of 0.5 MB


def sigreg_sums_flops(tokens: int, directions: int, knots: int, *, backward: bool = False) -> int:
    """Operations: a sine and a cosine, and for each knot one step of the recurrence (6) and two sums."""
    return tokens * directions * (2 + knots * (6 + (4 if backward else 2)))


def sigreg_sums_bytes(tokens: int, directions: int, knots: int, *, backward: bool = False) -> int:
    """Fewest bytes moved: p read once, the sums written or read once, and backward the gradient written once."""
    return 4 * directions * (tokens * (2 if backward else 1) + 2 * knots)


def _angles(p: Tensor, rows: Tensor | None, spacing: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield spacing · p, and which of its rows are padding, (N, 1) bool; on a CPU so many rows at a time."""
    absent = (torch.arange(len(p), device=p.device) >= (len(p) if rows is None else rows))[:, None]
    together = max(1, _IN_CACHE // p.shape[1]) if p.device.type == "cpu" else max(1, len(p))
    for part, padding in zip(p.split(together), absent.split(together), strict=True):
        yield part * spacing, padding


def _multiples(angle: Tensor, knots: int) -> Tensor:
    """Σ over rows of cos(jθ) and of sin(jθ), (2, J, K), by Chebyshev's recurrence."""
    cosine, sine = angle.cos(), angle.sin()
    twice = 2 * cosine
    sums = [cosine.sum(0)], [sine.sum(0)]
    before_c, before_s = torch.ones_like(angle), torch.zeros_like(angle)
    for _ in range(knots - 1):
        before_c, cosine = cosine, before_c.neg_().addcmul_(twice, cosine)
        before_s, sine = sine, before_s.neg_().addcmul_(twice, sine)
        sums[0].append(cosine.sum(0))
        sums[1].append(sine.sum(0))
    return torch.stack([torch.stack(own) for own in sums])


class _Sums(torch.autograd.Function):
    """The reference, with only p saved."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, rows: Tensor | None, spacing: float, knots: int) -> Tensor:
        ctx.save_for_backward(p, rows)
        ctx.spacing, ctx.knots = spacing, knots
        sums = p.new_zeros(2, knots, p.shape[1])
        for angle, padding in _angles(p, rows, spacing):
            # A row of padding counts as an angle of 0: its sines are 0, and its cosines, 1, are taken off again.
            sums += _multiples(angle.masked_fill_(padding, 0.0), knots)
            sums[0] -= padding.sum()
        return sums

    @staticmethod
    @once_differentiable("sigreg_sums")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, rows = ctx.saved_tensors
        order = torch.arange(1, ctx.knots + 1, device=p.device, dtype=p.dtype)[:, None] * ctx.spacing
        of_cosine, of_sine = grads[0][1] * order, grads[0][0] * -order
        parts = [p.new_zeros(0, p.shape[1])]
        for angle, padding in _angles(p, rows, ctx.spacing):
            cosine, sine = angle.cos(), angle.sin()
            twice = 2 * cosine
            # Clenshaw: b_j = a_j + 2 cos θ · b_{j+1} − b_{j+2};
            # Σ a_j cos jθ = b_1 cos θ − b_2, Σ a_j sin jθ = b_1 sin θ.
            u, after_u, v, after_v = (torch.zeros_like(angle) for _ in range(4))
            for j in reversed(range(ctx.knots)):
                u, after_u = after_u.neg_().add_(of_cosine[j]).addcmul_(twice, u), u
                v, after_v = after_v.neg_().add_(of_sine[j]).addcmul_(twice, v), v
            parts.append(u.mul_(cosine).sub_(after_u).addcmul_(v, sine).masked_fill_(padding, 0.0))
        return torch.cat(parts), None, None, None


def sigreg_sums_reference(p: Tensor, *, spacing: float, knots: int, rows: Tensor | None = None) -> Tensor:
    """What `sigreg_sums` computes, in PyTorch's own operators. Arguments are not checked."""
    found: Tensor = _Sums.apply(p, rows, spacing, knots)
    return found


@triton.jit
@no_type_check
def _sine_and_cosine(angle):
    """Of fp32: two instructions of the GPU after a reduction to [−π, π] by a 2π in two parts; 2⁻²⁰ absolute."""
    if INTERPRETED:
        sine = tl.sin(angle)
        cosine = tl.cos(angle)
    else:
        turns = tl.inline_asm_elementwise(
            "cvt.rni.f32.f32 $0, $1;", "=f,f", [angle * 0.15915494309189535], dtype=tl.float32, is_pure=True, pack=1
        )
        angle = (angle - turns * 6.28125) - turns * 0.0019353071795864769
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    return sine, cosine


@triton.jit(do_not_specialize=["N", "ROWS", "rows_ptr"])
@no_type_check
def sigreg_kernel(
    p_ptr, rows_ptr, sums_ptr,
    N, K, ROWS, stride_pn, spacing,
    KNOTS: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums (programs, 2, KNOTS, K) fp32: of ROWS rows each, Σ cos(jθ) and Σ sin(jθ), θ = spacing · p."""
    i = tl.program_id(0)
    o_n = i * ROWS + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    end = min(i * ROWS + ROWS, N)
    if HAS_ROWS:
        end = min(end, tl.load(rows_ptr).to(tl.int32))
    sums = ()
    for _ in tl.static_range(2 * KNOTS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    for _ in range(i * ROWS, end, BLOCK_N):
        present = (o_n < end)[:, None] & m_k[None, :]
        p = tl.load(p_ptr + o_n.to(tl.int64)[:, None] * stride_pn + o_k[None, :], mask=present, other=0.0)
        first_s, first_c = _sine_and_cosine(p * spacing)
        sine = first_s  # of an angle of 0 where there is no row
        cosine = tl.where(present, first_c, 0.0)  # so that every multiple's is 0 too
        added = ()
        for j in tl.static_range(KNOTS):
            added = added + (sums[2 * j] + cosine, sums[2 * j + 1] + sine)
            turned = cosine * first_c - sine * first_s
            sine = sine * first_c + cosine * first_s
            cosine = turned
        sums = added
        o_n += BLOCK_N
    p_sums = sums_ptr + i * (2 * KNOTS) * K + o_k
    for j in tl.static_range(KNOTS):
        tl.store(p_sums + j * K, tl.sum(sums[2 * j], axis=0), mask=m_k)
        tl.store(p_sums + (KNOTS + j) * K, tl.sum(sums[2 * j + 1], axis=0), mask=m_k)


@triton.jit(do_not_specialize=["N", "rows_ptr"])
@no_type_check
def sigreg_backward_kernel(
    p_ptr, rows_ptr, grad_sums_ptr, grad_ptr,
    N, K, stride_pn, stride_gn, spacing,
    KNOTS: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad (N, K) = Σ_j j · spacing · (grad_sums[1, j] cos(jθ) − grad_sums[0, j] sin(jθ)); 0 for rows of padding."""
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    of_cosine = ()
    of_sine = ()
    for j in tl.static_range(KNOTS):
        factor = (j + 1) * spacing
        of_cosine = of_cosine + (factor * tl.load(grad_sums_ptr + (KNOTS + j) * K + o_k, mask=m_k, other=0.0),)
        of_sine = of_sine + (factor * tl.load(grad_sums_ptr + j * K + o_k, mask=m_k, other=0.0),)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (o_n < N)[:, None] & m_k[None, :]
    present = N
    if HAS_ROWS:
        present = tl.load(rows_ptr).to(tl.int32)
    rows = o_n.to(tl.int64)[:, None]
    p = tl.load(p_ptr + rows * stride_pn + o_k[None, :], mask=m, other=0.0)
    first_s, first_c = _sine_and_cosine(p * spacing)
    sine = first_s
    cosine = first_c
    grad = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for j in tl.static_range(KNOTS):
        grad += of_cosine[j][None, :] * cosine - of_sine[j][None, :] * sine
        turned = cosine * first_c - sine * first_s
        sine = sine * first_c + cosine * first_s
        cosine = turned
    grad = tl.where((o_n < present)[:, None], grad, 0.0)
    tl.store(grad_ptr + rows * stride_gn + o_k[None, :], grad, mask=m)


def launch_sigreg_sums(p: Tensor, rows: Tensor | None, spacing: float, knots: int) -> Tensor:
    """Launch `sigreg_kernel` and the sum of its programs: (2, knots, K) fp32."""
    count, directions = p.shape
    p = rows_together(p)
    blocks = triton.cdiv(directions, _BLOCK_K)
    depth = _BLOCK_N * triton.cdiv(max(8, triton.cdiv(count * blocks, SUM_PROGRAMS)), _BLOCK_N)
    programs = triton.cdiv(count, depth)
    sums = torch.empty(programs, 2, knots, directions, dtype=torch.float32, device=p.device)
    with launching(p):
        sigreg_kernel[(programs, blocks)](
            p_ptr=p, rows_ptr=rows, sums_ptr=sums, N=count, K=directions, ROWS=depth, stride_pn=p.stride(0),
            spacing=spacing, KNOTS=knots, HAS_ROWS=rows is not None, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
            num_warps=4,
        )  # fmt: skip
        return add_slices(sums, torch.float32)


def launch_sigreg_sums_backward(
    p: Tensor, rows: Tensor | None, grad_sums: Tensor, spacing: float, grad: Tensor
) -> None:
    """Launch `sigreg_backward_kernel`: write grad (N, K) fp32 from grad_sums (2, knots, K) fp32."""
    count, directions = p.shape
    p = rows_together(p)
    with launching(p):
        grid = (triton.cdiv(count, _BACKWARD_ROWS), triton.cdiv(directions, _BLOCK_K))
        sigreg_backward_kernel[grid](
            p_ptr=p, rows_ptr=rows, grad_sums_ptr=grad_sums, grad_ptr=grad, N=count, K=directions,
            stride_pn=p.stride(0), stride_gn=grad.stride(0), spacing=spacing, KNOTS=grad_sums.shape[1],
            HAS_ROWS=rows is not None, BLOCK_N=_BACKWARD_ROWS, BLOCK_K=_BLOCK_K, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("iwm_fast::sigreg_sums", mutates_args=())
def _operator(p: Tensor, rows: Tensor | None, spacing: float, knots: int) -> Tensor:
    if not p.numel():
        return p.new_zeros(2, knots, p.shape[1])
    return launch_sigreg_sums(p, rows, spacing, knots)


@_operator.register_fake
def _(p: Tensor, rows: Tensor | None, spacing: float, knots: int) -> Tensor:
    return p.new_empty(2, knots, p.shape[1])


@torch.library.custom_op("iwm_fast::sigreg_sums_backward", mutates_args=())
def _backward_operator(incoming: Tensor, p: Tensor, rows: Tensor | None, spacing: float) -> Tensor:
    grad = torch.empty_like(p, memory_format=torch.contiguous_format)
    if grad.numel():
        launch_sigreg_sums_backward(p, rows, incoming.contiguous(), spacing, grad)
    return grad


@_backward_operator.register_fake
def _(incoming: Tensor, p: Tensor, *_: Any) -> Tensor:
    return p.new_empty(p.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    p, rows, ctx.spacing, _ = inputs
    ctx.save_for_backward(p, rows)


def _differentiate(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    p, rows = ctx.saved_tensors
    return torch.ops.iwm_fast.sigreg_sums_backward(incoming, p, rows, ctx.spacing), None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.iwm_fast.sigreg_sums)
def _count(p: Any, rows: Any, spacing: float, knots: int, **__: Any) -> int:
    return sigreg_sums_flops(p[0], p[1], knots)


@register_flop_formula(torch.ops.iwm_fast.sigreg_sums_backward)
def _count_backward(incoming: Any, p: Any, *_: Any, **__: Any) -> int:
    return sigreg_sums_flops(p[0], p[1], incoming[1], backward=True)


def sigreg_sums(p: Tensor, *, spacing: float, knots: int, rows: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Σ over tokens of cos(t · p) and of sin(t · p) at t = spacing · (1 … knots), of projections.

    Args:
        p: (N, K), fp32 or float64: half precision would cost 1.8e-3 of the gradient. N may be 0, which gives 0.
        spacing: between neighbouring t, above 0.
        knots: J, at least 1.
        rows: int64 (1,), how many of the N rows count, the first ones; None: all.
        backend: "triton" (fp32), "reference", or "auto": Triton on CUDA for fp32, else the reference.

    Returns:
        (2, J, K), of p's type: the cosines' sums, then the sines'.

    Raises:
        ValueError: an argument is of the wrong shape, type, size or device; its name comes first.

    """
    check_floating("p", p, 2)
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"p is {p.dtype}; it must be torch.float32 or torch.float64")
    if not spacing > 0:
        raise ValueError(f"spacing is {spacing}; it must be above 0")
    if knots < 1:
        raise ValueError(f"knots is {knots}; it must be at least 1")
    if rows is not None:
        check_shape("rows", rows, (1,), "one number of rows")
        check_like("rows", rows, "p", p, dtype=torch.int64)
    if resolve_backend(backend, "p", p) == "triton":
        found: Tensor = torch.ops.iwm_fast.sigreg_sums(p, rows, spacing, knots)
        return found
    with without_autocast(p):
        return sigreg_sums_reference(p, spacing=spacing, knots=knots, rows=rows)
