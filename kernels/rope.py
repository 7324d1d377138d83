"""Rotary positions (RoPE) of the queries and keys in a packed qkv, in place; v is neither read nor written.

    q[n, h, i]     ← q[n, h, i] · cos − q[n, h, i + d/2] · sin,       cos, sin = table[patches[n], i], …[i + d/2]
    q[n, h, i+d/2] ← q[n, h, i + d/2] · cos + q[n, h, i] · sin,       i < d/2; the same for k

qkv (N, 3, heads, d); table (L, d) fp32: cosines, then sines, of each patch's d/2 angles; patches int64 (N,): the row of
each token, or below 0: a token without a position, which stays as it is. Arithmetic is fp32 (float64 for float64),
rounded once. The gradient of a rotation is the rotation by the opposite angles.

Fused (Triton): one kernel per pass gathers the angles by patch, once per token for all heads of q and k. Forward, it
overwrites q and k: 2 · D elements read and written per token, no copy of v. Backward, attention gives either one packed
gradient, which is rotated in place too (`rotate_qk`), or three tensors: then the kernel rotates two of them while it
packs all three, for the bytes that packing takes anyway. Saved: the patches.

Reference (plain PyTorch, below): PyTorch's operators, out of place; on the CPU the same in place, in pieces that stay
in its caches.

FLOPs and bytes: `rope_flops`, `rope_bytes`.
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
from ._lib.checks import check_floating, check_index, check_like, check_shape
from ._lib.jit import to_type
from ._lib.once import once_differentiable
from ._lib.rows import launching

__all__ = ["rope", "rope_bytes", "rope_flops", "rope_reference", "rotate_qk"]

_INDEX = 8  # bytes of an int64
_PAIRS = 1024  # that a program of 4 warps holds of q and of k at once
# Elements of q and k that the CPU rotates at once, so that temporaries stay in its caches.
_PIECE = 2**16


def rope_flops(tokens: int, width: int, *, backward: bool = False) -> int:
    """Return FLOPs: two multiplications and an addition per element of q and k, in either pass."""
    del backward
    return 3 * 2 * tokens * width


def rope_bytes(tokens: int, width: int, *, backward: bool = False, element: int = 2, packed: bool = True) -> int:
    """Return minimum bytes moved by one pass: q and k read and written once, and an index per token.

    packed: whether the gradients are one tensor; else the backward pass reads and writes v's too. The table stays in L2
    and is not counted.
    """
    parts = 3 if backward and not packed else 2
    return tokens * (2 * parts * width * element + _INDEX)


def rope_reference(qkv: Tensor, table: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `rope` does with PyTorch's operators, out of place. Arguments are not checked."""
    cos, sin = _angles(table, patches, torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = qkv.unbind(1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).chunk(2, dim=2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=2).to(x.dtype)


def _angles(table: Tensor, patches: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token, (N, 1, d/2); 1 and 0 where it has no position."""
    without = (patches < 0)[:, None, None]
    cos, sin = table.to(dtype).index_select(0, patches.clamp(min=0))[:, None].chunk(2, dim=2)
    return cos.masked_fill(without, 1.0), sin.masked_fill(without, 0.0)


def _rotate_in_place(qkv: Tensor, table: Tensor, patches: Tensor, inverse: bool) -> None:
    """What `launch_rope` does in place, in PyTorch's operators: x · cos + (x with its halves swapped) · ∓sin."""
    heads, width = qkv.shape[2:]
    exact = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = table.to(exact).chunk(2, dim=1)
    sin = -sin if inverse else sin
    # The first row: of tokens without a position.
    of_own = F.pad(torch.cat([cos, cos], dim=1), (0, 0, 1, 0), value=1.0)
    of_other = F.pad(torch.cat([-sin, sin], dim=1), (0, 0, 1, 0))
    piece = max(1, _PIECE // (2 * heads * width))
    parts = qkv.flatten(1, 2)[:, : 2 * heads].split(piece)  # q's heads, then k's
    for x, rows in zip(parts, (patches + 1).split(piece), strict=True):
        other = x.roll(width // 2, 2).to(exact)
        turned = x if x.dtype == exact else x.to(exact)
        turned.mul_(of_own.index_select(0, rows)[:, None]).addcmul_(other, of_other.index_select(0, rows)[:, None])
        if turned is not x:
            x.copy_(turned)


@triton.jit(do_not_specialize=["N", "L", "patches_ptr"])
@no_type_check
def rope_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, patches_ptr,
    N, L,
    stride_qn, stride_kn, stride_vn, stride_on, stride_tl,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out (N, 3, HEADS, 2 · HALF): q and k rotated. In place, or with PACK: also v, and tokens without a position.

    A patch of L or more counts as NaN.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_I)
    m_n, m_i = o_n < N, o_i < HALF
    tokens = o_n.to(tl.int64)[:, None]
    patch = tl.load(patches_ptr + o_n, mask=m_n, other=-1)
    m_known = (patch >= 0) & (patch < L)
    p_table = table_ptr + patch[:, None] * stride_tl + o_i[None, :]
    m_table = m_known[:, None] & m_i[None, :]
    cos = tl.load(p_table, mask=m_table, other=1.0).to(tl.float32)  # (BLOCK_N, BLOCK_I)
    sin = tl.load(p_table + HALF, mask=m_table, other=0.0).to(tl.float32)
    cos = tl.where((patch < L)[:, None], cos, float("nan"))
    if INVERSE:
        sin = -sin
    m = (m_n if PACK else m_n & (patch >= 0))[:, None] & m_i[None, :]
    for head in range(HEADS):
        o = head * 2 * HALF + o_i[None, :]
        p_out = out_ptr + tokens * stride_on + o
        for part in tl.static_range(2):
            p_in = (q_ptr + tokens * stride_qn if part == 0 else k_ptr + tokens * stride_kn) + o
            a = tl.load(p_in, mask=m, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_I)
            b = tl.load(p_in + HALF, mask=m, other=0.0).to(tl.float32)
            p_part = p_out + part * HEADS * 2 * HALF
            tl.store(p_part, to_type(a * cos - b * sin, out_ptr.dtype.element_ty), mask=m)
            tl.store(p_part + HALF, to_type(b * cos + a * sin, out_ptr.dtype.element_ty), mask=m)
        if PACK:
            p_in = v_ptr + tokens * stride_vn + o
            p_v = p_out + 2 * HEADS * 2 * HALF
            tl.store(p_v, tl.load(p_in, mask=m, other=0.0), mask=m)
            tl.store(p_v + HALF, tl.load(p_in + HALF, mask=m, other=0.0), mask=m)


def launch_rope(
    q: Tensor, k: Tensor, v: Tensor | None, table: Tensor, patches: Tensor, out: Tensor, *, inverse: bool
) -> None:
    """Rotate q and k (N, heads, d) into out (N, 3, heads, d). v: packed with them; None: in place."""
    count, heads, width = q.shape
    half = width // 2
    block_i = triton.next_power_of_2(half)
    block_n = max(1, _PAIRS // block_i)
    with launching(out):
        rope_kernel[(triton.cdiv(count, block_n),)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, table_ptr=table, patches_ptr=patches,
            N=count, L=len(table),
            stride_qn=_row_stride(q), stride_kn=_row_stride(k), stride_vn=0 if v is None else _row_stride(v),
            stride_on=_row_stride(out), stride_tl=table.stride(0),
            HEADS=heads, HALF=half, INVERSE=inverse, PACK=v is not None,
            BLOCK_N=block_n, BLOCK_I=block_i, num_warps=4,
        )  # fmt: skip


def _row_stride(x: Tensor) -> int:
    """The stride of tokens; of a single one, that which several would have: Triton would compile a variant for it."""
    return x.stride(0) if len(x) > 1 else x[0].numel()


def _heads_together(x: Tensor) -> Tensor:
    """Return x (N, heads, d), or a copy, with each token's heads in one piece."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@torch.library.custom_op("iwm_fast::rope_", mutates_args=("qkv",))
def _operator(qkv: Tensor, table: Tensor, patches: Tensor, inverse: bool) -> None:
    if qkv.numel():
        launch_rope(qkv[:, 0], qkv[:, 1], None, table, patches, qkv, inverse=inverse)


@torch.library.custom_op("iwm_fast::rope_backward", mutates_args=())
def _backward_operator(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, patches: Tensor) -> Tensor:
    """Return the gradient of qkv (N, 3, heads, d) from those of the rotated q and k, and of v."""
    count, heads, width = dq.shape
    out = torch.empty(count, 3, heads, width, dtype=dq.dtype, device=dq.device)
    if out.numel():
        q, k, v = (_heads_together(part) for part in (dq, dk, dv))
        launch_rope(q, k, v, table, patches, out, inverse=True)
    return out


@_backward_operator.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, patches: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], 3, dq.shape[1], dq.shape[2])


@register_flop_formula(torch.ops.iwm_fast.rope_)
def _count(qkv: Any, *_: Any, **__: Any) -> int:
    return rope_flops(qkv[0], qkv[2] * qkv[3])


@register_flop_formula(torch.ops.iwm_fast.rope_backward)
def _count_backward(dq: Any, *_: Any, **__: Any) -> int:
    return rope_flops(dq[0], dq[1] * dq[2], backward=True)


class _Rope(torch.autograd.Function):
    """`rope`: q, k and v are views of qkv, which lies before in no other node's saved tensors."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, patches: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table, patches)
        ctx.backend = backend
        # A detached view shares the version counter: a node that saved qkv reports the change.
        _rotate(qkv.detach(), table, patches, backend, inverse=False)
        q, k, v = qkv.unbind(1)
        return q, k, v

    @staticmethod
    @once_differentiable("rope")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, patches = ctx.saved_tensors
        if ctx.backend == "triton":
            return torch.ops.iwm_fast.rope_backward(*grads, table, patches), None, None, None
        with without_autocast(grads[0]):
            packed = torch.stack(grads, dim=1)
            _rotate_in_place(packed, table, patches, inverse=True)
        return packed, None, None, None


def _rotate(qkv: Tensor, table: Tensor, patches: Tensor, backend: str, *, inverse: bool) -> None:
    if backend == "triton":
        torch.ops.iwm_fast.rope_(qkv, table, patches, inverse)
        return
    with without_autocast(qkv):
        _rotate_in_place(qkv, table, patches, inverse)


def rope(qkv: Tensor, table: Tensor, patches: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the queries and keys of a packed qkv in place.

    Args:
        qkv: (N, 3, heads, d), any floating dtype, d a multiple of 2, each token in one piece; overwritten.
        table: (L, d), fp32 or float64: cosines of d/2 angles, then their sines; gets no gradient.
        patches: int64 (N,), the row of `table` of each token; below 0: the token stays as it is.
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else PyTorch's operators.

    Values of `patches` are checked on the CPU only. On a GPU one of L or more counts as NaN. Autocast does nothing.
    While torch.compile traces, PyTorch's operators run out of place, and qkv stays as it is.

    Returns:
        q, k and v, (N, heads, d) each: views of qkv.

    Raises:
        ValueError: an argument has a wrong shape, dtype, value or device; the message begins with its name.

    """
    backend = _checked(qkv, table, patches, backend)
    if torch.compiler.is_compiling():
        with without_autocast(qkv):
            return rope_reference(qkv, table.detach(), patches)
    found: tuple[Tensor, Tensor, Tensor] = _Rope.apply(qkv, table.detach(), patches, backend)
    return found


@torch.no_grad()
def rotate_qk(qkv: Tensor, table: Tensor, patches: Tensor, *, inverse: bool = False, backend: str = "auto") -> None:
    """As `rope`, without a gradient; inverse: by the opposite angles, as a packed gradient must be."""
    _rotate(qkv, table, patches, _checked(qkv, table, patches, backend), inverse=inverse)


def _checked(qkv: Tensor, table: Tensor, patches: Tensor, backend: str) -> str:
    """Require arguments that fit together; return the backend."""
    check_floating("qkv", qkv, 4)
    count, parts, heads, width = qkv.shape
    if parts != 3 or width % 2 or not width:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (N, 3, heads, d) with an even d")
    if qkv.stride()[1:] != (heads * width, width, 1) or (count > 1 and qkv.stride(0) < parts * heads * width):
        raise ValueError(f"qkv has strides {qkv.stride()}; each token must lie in one piece, and none in another's")
    check_floating("table", table, 2)
    check_shape("table", table, (len(table), width), "(L, d)")
    exact = torch.float64 if table.dtype == torch.float64 else torch.float32
    check_like("table", table, "qkv", qkv, dtype=exact)
    if table.stride(1) != 1:
        raise ValueError(f"table has strides {table.stride()}; its rows must be contiguous")
    check_index("patches", patches, count, "(N,)", "table", qkv, len(table), lowest=-1)
    if len(patches) and patches.stride(0) != 1:
        raise ValueError("patches is not contiguous; call contiguous()")
    return resolve_backend(backend, "qkv", qkv)
