"""Self-attention within each image of a packed batch: which library computes it is decided here and nowhere else.

On a GPU, xformers' `memory_efficient_attention` with a block-diagonal mask: FlashAttention in half precision. Its
gradients of q, k and v are three tensors, which the backward pass of their split copies into one: 12 bytes moved for
each number of q in bf16. "efficient" is PyTorch's own memory-efficient attention (CUTLASS), which writes all three into
one tensor; in fp32 xformers takes the same kernels, so there it stands in for xformers.

On the CPU, where xformers has no operator, PyTorch's SDPA, one dense call for all images of the same length: at 128
images, 4 heads of 32, contexts of 15–35 and predictor sequences of 35–60 tokens, forward and backward on two cores take
6.5 and 14 ms so, 8 and 16 ms padded with a mask, and no operation is spent on padding. In bf16 it is computed in fp32:
PyTorch's CPU kernel for halves takes 1.3 to 9 times as long, forward and backward, as fp32 with the conversions (heads
of 32 and 64, 34 to 196 tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast.errors import UserError
from iwm_fast.kernels.permutation import take_rows

from .packing import Segments

__all__ = ["Attention", "packed_attention", "packed_qkv_attention", "resolve_backend", "use_library"]

_BACKENDS = ("auto", "xformers", "efficient", "sdpa")

# In xformers' place, from q, k and v (1, N, heads, d) to what it gives.
_library: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@contextlib.contextmanager
def use_library(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``attend`` stand in for xformers inside, on every device: launches are counted and nothing is computed."""
    global _library  # noqa: PLW0603  (for all threads: autograd has its own)
    before, _library = _library, attend
    resolve_backend.cache_clear()
    try:
        yield
    finally:
        _library = before
        resolve_backend.cache_clear()


@cache
def _xformers() -> Any | None:
    """The operators of xformers, or None where it is not installed. Imported when first needed: it takes a second."""
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


@cache
def resolve_backend(requested: str, device: str) -> str:
    """The attention that runs on a device: "xformers", "efficient" or "sdpa".

    Args:
        requested: "auto", "xformers", "efficient" or "sdpa", the config's model.attention.
        device: a device's type, "cpu" or "cuda".

    Raises:
        UserError: an attention was asked for by name and cannot run.
        ValueError: an unknown name.

    """
    if requested not in _BACKENDS:
        raise ValueError(f"requested is {requested!r}; it must be one of {', '.join(_BACKENDS)}")
    if _library is not None and requested != "sdpa":
        return "efficient" if requested == "efficient" else "xformers"
    if requested == "sdpa":
        return "sdpa"
    if device != "cuda":
        if requested != "auto":
            raise UserError(f"model.attention is {requested}, which has no operator for {device}: use auto or sdpa")
        return "sdpa"
    if requested == "efficient":
        return "efficient"
    if _xformers() is None:
        if requested == "xformers":
            raise UserError("model.attention is xformers, which is not installed: install it, or use auto or efficient")
        return "efficient"
    return "xformers"


def packed_qkv_attention(qkv: Tensor, segments: Segments, backend: str) -> Tensor:
    """`packed_attention` of q, k and v = qkv[:, 0], qkv[:, 1] and qkv[:, 2], of qkv (N, 3, heads, d): (N, heads, d)."""
    if backend == "xformers" and qkv.dtype == torch.float32:  # whose operator for it this is
        backend = "efficient"
    if backend == "efficient" and segments.total and torch.is_grad_enabled() and qkv.requires_grad:
        _check_segments(qkv, segments)
        out: Tensor = _Efficient.apply(qkv, segments)
        return out
    q, k, v = qkv.unbind(1)
    return packed_attention(q, k, v, segments, backend)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """softmax(q kᵀ / √d) v of each image for itself.

    Args:
        q: (N, heads, d), packed; the three may be views of one tensor.
        k: as q.
        v: as q.
        segments: of the N tokens.
        backend: "xformers", "efficient" or "sdpa", from `resolve_backend`.

    Returns:
        (N, heads, d). The softmax is computed in fp32 by all backends.

    Raises:
        ValueError: the segments do not add up to N (xformers would accept that in silence), or an unknown backend.

    """
    _check_segments(q, segments)
    if segments.total == 0:
        return v
    if backend == "xformers":
        return _xformers_attention(q, k, v, segments)
    if backend == "efficient":
        return _efficient_forward(q, k, v, segments, for_backward=q.requires_grad and torch.is_grad_enabled())[0][0]
    if backend != "sdpa":
        raise ValueError(f"backend is {backend!r}; it must be xformers, efficient or sdpa")
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return packed_attention(q.float(), k.float(), v.float(), segments, backend).to(q.dtype)
    if len(set(segments.lengths)) == len(segments.groups):
        return _grouped_sdpa(q, k, v, segments)
    by_length = segments.by_length
    order, rank = by_length.token_order, by_length.token_rank
    q, k, v = (take_rows(part, order, rank) for part in (q, k, v))
    return take_rows(_grouped_sdpa(q, k, v, by_length.segments), rank, order)


def _check_segments(x: Tensor, segments: Segments) -> None:
    if x.shape[0] != segments.total:
        raise ValueError(f"segments have {segments.total} tokens in all; q has {x.shape[0]}")


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if _library is not None:
        return _library(q[None], k[None], v[None])[0]
    ops = _xformers()
    if ops is None:
        raise ValueError("backend is xformers, which is not installed")
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=segments.block_diagonal_mask)[0]


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, for_backward: bool) -> tuple[Any, ...]:
    """The operator's results: (1, N, heads, d), log-sum-exp (images, heads, ·), and what dropout would have needed."""
    bounds, longest = segments.filled_bounds, max(segments.lengths)
    found: tuple[Any, ...] = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, 0, for_backward
    )
    return found


class _Efficient(torch.autograd.Function):
    """PyTorch's memory-efficient attention of a packed qkv, whose gradient its backward kernel writes whole.

    Autograd's own rule for that operator asks it for three tensors.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, segments: Segments) -> Tensor:
        q, k, v = qkv.unbind(1)
        out, *saved = _efficient_forward(q, k, v, segments, for_backward=True)
        ctx.save_for_backward(qkv, out, *saved[:3])
        ctx.segments = segments
        return out[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, out, log_sum_exp, seed, offset = ctx.saved_tensors
        bounds, longest = ctx.segments.filled_bounds, max(ctx.segments.lengths)
        q, k, v = (part[None] for part in qkv.unbind(1))
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(  # noqa: SLF001
            grad[None].contiguous(), q, k, v, None, out, bounds, bounds, longest, longest, log_sum_exp, 0.0, seed,
            offset, 0, False, shared_storage_dqdkdv=True,
        )  # fmt: skip
        return _whole(dq[0], dk[0], dv[0]), None


def _whole(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The (N, 3, heads, d) tensor that the three are the parts of."""
    step = dk.storage_offset() - dq.storage_offset()
    assert step == dq.shape[1] * dq.shape[2]
    assert dv.storage_offset() - dk.storage_offset() == step
    assert dq.untyped_storage().data_ptr() == dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()
    tokens, heads, width = dq.shape
    return dq.as_strided((tokens, 3, heads, width), (dq.stride(0), step, dq.stride(1), 1))


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """One dense call for each run of images of the same length."""
    sizes = [images * length for images, length in segments.groups]
    results = []
    for (images, length), *parts in zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if length == 0:
            continue
        dense = (part.unflatten(0, (images, length)).transpose(1, 2) for part in parts)  # (images, heads, length, d)
        results.append(F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1))
    return results[0] if len(results) == 1 else torch.cat(results)


class Attention(nn.Module):
    """Multi-head self-attention over packed tokens; qkv and proj as in timm, applied by the block that has it."""

    def __init__(self, width: int, heads: int, attention: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, qkv: Tensor, segments: Segments) -> Tensor:
        """(N, 3 · D) packed, what `qkv` gives, → (N, D), what `proj` takes."""
        backend = resolve_backend(self.attention, qkv.device.type)
        return packed_qkv_attention(qkv.unflatten(1, (3, self.heads, -1)), segments, backend).flatten(1)
