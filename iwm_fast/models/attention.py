"""Self-attention within each image of a packed batch: which library computes it is decided here and nowhere else.

On a GPU, xformers' `memory_efficient_attention` with a block-diagonal mask. On the CPU, where xformers has no operator,
PyTorch's SDPA, one dense call for all images of the same length: at 128 images, 4 heads of 32, contexts of 15–35 and
predictor sequences of 35–60 tokens, forward and backward on two cores take 6.5 and 14 ms so, 8 and 16 ms padded with a
mask, and no operation is spent on padding. In bf16 it is computed in fp32: PyTorch's CPU kernel for halves takes 1.3 to
9 times as long, forward and backward, as fp32 with the conversions (heads of 32 and 64, 34 to 196 tokens).
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

__all__ = ["Attention", "packed_attention", "resolve_backend", "use_library"]

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
    """The attention that runs on a device: "xformers" or "sdpa".

    Args:
        requested: "auto", "xformers" or "sdpa", the config's model.attention.
        device: a device's type, "cpu" or "cuda".

    Raises:
        UserError: xformers was asked for by name and cannot run.
        ValueError: an unknown name.

    """
    if requested not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"requested is {requested!r}; it must be auto, xformers or sdpa")
    if _library is not None and requested != "sdpa":
        return "xformers"
    if requested == "sdpa":
        return "sdpa"
    if device != "cuda":
        if requested == "xformers":
            raise UserError(f"model.attention is xformers, which has no operator for {device}: use auto or sdpa")
        return "sdpa"
    if _xformers() is None:
        if requested == "xformers":
            raise UserError("model.attention is xformers, which is not installed: install it, or use auto or sdpa")
        return "sdpa"
    return "xformers"


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """softmax(q kᵀ / √d) v of each image for itself.

    Args:
        q: (N, heads, d), packed; the three may be views of one tensor.
        k: as q.
        v: as q.
        segments: of the N tokens.
        backend: "xformers" or "sdpa", from `resolve_backend`.

    Returns:
        (N, heads, d). The softmax is computed in fp32 by both backends.

    Raises:
        ValueError: the segments do not add up to N (xformers would accept that in silence), or an unknown backend.

    """
    if q.shape[0] != segments.total:
        raise ValueError(f"segments have {segments.total} tokens in all; q has {q.shape[0]}")
    if segments.total == 0:
        return v
    if backend == "xformers":
        return _xformers_attention(q, k, v, segments)
    if backend != "sdpa":
        raise ValueError(f"backend is {backend!r}; it must be xformers or sdpa")
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return packed_attention(q.float(), k.float(), v.float(), segments, backend).to(q.dtype)
    if len(set(segments.lengths)) == len(segments.groups):
        return _grouped_sdpa(q, k, v, segments)
    by_length = segments.by_length
    order, rank = by_length.token_order, by_length.token_rank
    q, k, v = (take_rows(part, order, rank) for part in (q, k, v))
    return take_rows(_grouped_sdpa(q, k, v, by_length.segments), rank, order)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if _library is not None:
        return _library(q[None], k[None], v[None])[0]
    ops = _xformers()
    if ops is None:
        raise ValueError("backend is xformers, which is not installed")
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=segments.block_diagonal_mask)[0]


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
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        return packed_attention(q, k, v, segments, backend).flatten(1)
