"""Self-attention within each image of a packed batch; this module alone decides which library computes it.

On a GPU: xformers' `memory_efficient_attention` with a block-diagonal mask, or the backend that shipped measurements
found faster there for such lengths (`measured_attention`, written by `benchmarks.attention`).

xformers uses FlashAttention in half precision. Its gradients of q, k and v are three tensors, which the backward pass
of their split copies into one: 12 bytes moved per element of q in bf16. "efficient" is PyTorch's own memory-efficient
attention (CUTLASS), which writes all three into one tensor; in fp32 xformers runs the same kernels, so "efficient"
replaces it there.

On the CPU, where xformers has no operator: PyTorch's SDPA, one dense call for all images of the same length. At 128
images, 4 heads of 32, contexts of 15–35 and predictor sequences of 35–60 tokens, forward and backward on two cores take
6.5 and 14 ms, against 8 and 16 ms padded with a mask. bf16 is computed in fp32: PyTorch's CPU kernel for half precision
takes 1.3 to 9 times as long as fp32 with the conversions (heads of 32 and 64, 34 to 196 tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iwm_fast.errors import UserError
from iwm_fast.kernels import rope, rotate_qk
from iwm_fast.kernels._lib.once import once_differentiable
from iwm_fast.kernels.permutation import take_rows
from iwm_fast.models.attention_operators import HALVES, OPERATORS
from iwm_fast.models.measured_attention import measured_backends, measured_choice
from iwm_fast.models.packing import Segments
from iwm_fast.models.positions import Rotation

__all__ = [
    "BACKENDS",
    "GROUPED",
    "Attention",
    "choose_backend",
    "describe_attention",
    "packed_attention",
    "packed_qkv_attention",
    "require_attention",
    "resolve_backend",
    "unavailable",
    "use_library",
]

BACKENDS = ("xformers", "efficient", "sdpa", "cudnn", *OPERATORS)
# One dense call per length: callers sort images by length once, which saves moving tokens at every call.
GROUPED = frozenset({"sdpa", "cudnn"})
# Backends for half precision only; fp32 (an evaluation, say) uses "auto" instead.
_IN_HALVES = frozenset({"cudnn", *OPERATORS})

# Replaces xformers: a function of q, k and v (1, N, heads, d).
_library: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@contextlib.contextmanager
def use_library(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replace xformers by ``attend`` inside, on every device, to count launches without computing."""
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
    """Operators of xformers, or None where it is not installed. Imported when first needed, which takes a second."""
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def unavailable(backend: str, device: str) -> str | None:
    """Return why one of BACKENDS cannot run on a device's type, to follow "which"; None where it can."""
    if backend == "sdpa":
        return None
    if backend in OPERATORS:
        return OPERATORS[backend].missing(device)
    if device != "cuda":
        return f"has no operator for {device}"
    if backend == "efficient":
        return None
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "needs cuDNN, which this torch has not"
    return "is not installed" if _xformers() is None else None


@cache
def resolve_backend(requested: str, device: str) -> str:
    """Return the backend for a device without measurements: one of BACKENDS.

    Args:
        requested: "auto" or one of BACKENDS, the config's model.attention.
        device: a device's type, "cpu" or "cuda".

    Raises:
        UserError: a backend given by name cannot run.
        ValueError: an unknown name.

    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"requested is {requested!r}; it must be one of {', '.join(('auto', *BACKENDS))}")
    if _library is not None and requested != "sdpa":
        return "efficient" if requested == "efficient" else "xformers"
    if requested == "auto":
        return next(name for name in ("xformers", "efficient", "sdpa") if unavailable(name, device) is None)
    reason = unavailable(requested, device)
    if reason is not None:
        remedy = ": install it, or use auto or efficient" if "installed" in reason else ": use auto or sdpa"
        raise UserError(f"model.attention is {requested}, which {reason}{remedy}")
    return requested


def require_attention(requested: str, device: str, precision: str) -> None:
    """Raise UserError where training cannot use the requested backend. precision: fp32 or bf16."""
    backend = resolve_backend(requested, device)
    if backend in _IN_HALVES and precision == "fp32":
        raise UserError(
            f"model.attention is {requested}, which computes in bf16 or fp16, and train.precision is fp32: use bf16, "
            "or model.attention=auto"
        )


def describe_attention(requested: str, device: torch.device) -> str:
    """Return the backend for a log, and whether measurements chose it."""
    usual = resolve_backend(requested, device.type)
    if requested != "auto" or device.type != "cuda":
        return usual
    chosen = measured_backends(device)
    if not chosen:
        return f"{usual} (no measurements of this GPU)"
    return f"{usual}, or by measurements of this GPU {' or '.join(chosen)}"


def choose_backend(
    requested: str,
    device: torch.device,
    segments: Segments,
    heads: int,
    head: int,
    dtype: torch.dtype,
    *,
    gradients: bool,
) -> str:
    """The attention for such a batch: one of BACKENDS.

    Args:
        requested: "auto" or one of BACKENDS.
        device: of the tokens.
        segments: of the tokens.
        heads: how many.
        head: numbers of each.
        dtype: of q, k and v.
        gradients: whether there will be a backward pass.

    Raises:
        UserError: as `resolve_backend`.

    """
    usual = resolve_backend(requested, device.type)
    if device.type != "cuda":
        return usual
    if usual in _IN_HALVES and dtype not in HALVES:
        return resolve_backend("auto", device.type)
    if requested != "auto" or _library is not None:
        return usual
    if torch.are_deterministic_algorithms_enabled():
        return "efficient"  # deterministic in this mode; a measured backend may not be
    found = measured_choice(device, segments, heads, head, dtype, gradients=gradients)
    if found in GROUPED and segments.padding:
        return usual  # with static shapes another batch has other groups
    return found if found in BACKENDS and unavailable(found, device.type) is None else usual


def packed_qkv_attention(qkv: Tensor, segments: Segments, backend: str, rotation: Rotation | None = None) -> Tensor:
    """`packed_attention` of q, k and v = qkv[:, 0], qkv[:, 1] and qkv[:, 2], of qkv (N, 3, heads, d): (N, heads, d).

    rotation: of q and k first, in place.
    """
    if backend == "xformers" and qkv.dtype == torch.float32:  # xformers' own operator for fp32
        backend = "efficient"
    if backend == "efficient" and segments.total and torch.is_grad_enabled() and qkv.requires_grad:
        _check_segments(qkv, segments)
        out: Tensor = _Efficient.apply(qkv, segments, rotation)
        return out
    q, k, v = qkv.unbind(1) if rotation is None else rope(qkv, rotation.table, rotation.patches)
    return packed_attention(q, k, v, segments, backend)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """Return softmax(q kᵀ / √d) v within each image.

    Args:
        q: (N, heads, d), packed; the three may be views of one tensor.
        k: as q.
        v: as q.
        segments: of the N tokens.
        backend: one of BACKENDS, from `choose_backend`.

    Returns:
        (N, heads, d). All backends compute the softmax in fp32.

    Raises:
        ValueError: the segments do not add up to N (xformers would accept that silently), or an unknown backend.

    """
    _check_segments(q, segments)
    if segments.total == 0:
        return v
    if backend == "xformers":
        return _xformers_attention(q, k, v, segments)
    if backend == "efficient":
        return _efficient_forward(q, k, v, segments, for_backward=q.requires_grad and torch.is_grad_enabled())[0][0]
    if backend in OPERATORS:
        return OPERATORS[backend].attend(q, k, v, segments)
    if backend not in GROUPED:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return packed_attention(q.float(), k.float(), v.float(), segments, backend).to(q.dtype)
    attend = _grouped_cudnn if backend == "cudnn" else _grouped_sdpa
    if len(set(segments.lengths)) == len(segments.groups):
        return attend(q, k, v, segments)
    by_length = segments.by_length
    order, rank = by_length.token_order, by_length.token_rank
    q, k, v = (take_rows(part, order, rank) for part in (q, k, v))
    return take_rows(attend(q, k, v, by_length.segments), rank, order)


def _check_segments(x: Tensor, segments: Segments) -> None:
    if x.shape[0] != segments.total:
        raise ValueError(f"segments have {segments.total} tokens in all; q has {x.shape[0]}")


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if _library is not None:
        return _library(q[None], k[None], v[None])[0]
    ops = _xformers()
    if ops is None:
        raise ValueError("backend is xformers, which is not installed")
    parts, named = (q[None], k[None], v[None]), {}
    if torch.are_deterministic_algorithms_enabled():
        # xformers' flash-attention has no deterministic backward pass, and no other operator can continue its forward
        # pass.
        named["op"] = ops.fmha.cutlass.FwOp, ops.fmha.cutlass.BwOp
    return ops.memory_efficient_attention(*parts, attn_bias=segments.block_diagonal_mask, **named)[0]


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, for_backward: bool) -> tuple[Any, ...]:
    """The operator's results: (1, N, heads, d), log-sum-exp (images, heads, ·), and the state of dropout."""
    bounds, longest = segments.filled_bounds, segments.longest
    found: tuple[Any, ...] = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, 0, for_backward
    )
    return found


class _Efficient(torch.autograd.Function):
    """PyTorch's memory-efficient attention of a packed qkv, whose backward kernel writes one gradient tensor.

    Autograd's own rule for that operator makes it write three. That tensor is this node's own: it is rotated in place.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, segments: Segments, rotation: Rotation | None) -> Tensor:
        if rotation is not None:
            rotate_qk(qkv.detach(), rotation.table, rotation.patches)
        q, k, v = qkv.unbind(1)
        out, *saved = _efficient_forward(q, k, v, segments, for_backward=True)
        ctx.save_for_backward(qkv, out, *saved[:3])
        ctx.segments, ctx.rotation = segments, rotation
        return out[0]

    @staticmethod
    @once_differentiable("attention by the memory-efficient operator")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, log_sum_exp, seed, offset = ctx.saved_tensors
        bounds, longest = ctx.segments.filled_bounds, ctx.segments.longest
        q, k, v = (part[None] for part in qkv.unbind(1))
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(  # noqa: SLF001
            grad[None].contiguous(), q, k, v, None, out, bounds, bounds, longest, longest, log_sum_exp, 0.0, seed,
            offset, 0, False, shared_storage_dqdkdv=True,
        )  # fmt: skip
        whole = _whole(dq[0], dk[0], dv[0])
        if ctx.rotation is not None:
            rotate_qk(whole, ctx.rotation.table, ctx.rotation.patches, inverse=True)
        return whole, None, None


def _whole(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The (N, 3, heads, d) tensor that the three are views of."""
    step = dk.storage_offset() - dq.storage_offset()
    assert step == dq.shape[1] * dq.shape[2]
    assert dv.storage_offset() - dk.storage_offset() == step
    assert dq.untyped_storage().data_ptr() == dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()
    tokens, heads, width = dq.shape
    return dq.as_strided((tokens, 3, heads, width), (dq.stride(0), step, dq.stride(1), 1))


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """One dense call per run of images of the same length."""
    return _grouped(q, k, v, segments, F.scaled_dot_product_attention)


def _grouped_cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same by cuDNN; PyTorch's default computes images of one token, which cuDNN rejects."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return _grouped(q, k, v, segments, attend)


def _grouped(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: Callable[..., Tensor]) -> Tensor:
    sizes = [images * length for images, length in segments.groups]
    results = []
    for (images, length), *parts in zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if length == 0:
            continue
        dense = (part.unflatten(0, (images, length)).transpose(1, 2) for part in parts)  # (images, heads, length, d)
        results.append(attend(*dense).transpose(1, 2).flatten(0, 1))
    return results[0] if len(results) == 1 else torch.cat(results)


class Attention(nn.Module):
    """Multi-head self-attention over packed tokens; the block applies qkv and proj, named as in timm."""

    def __init__(self, width: int, heads: int, attention: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, qkv: Tensor, segments: Segments, rotation: Rotation | None = None) -> Tensor:
        """Map qkv (N, 3 · D), packed, to the input of `proj` (N, D). A rotation overwrites q and k."""
        backend = self._backend(qkv, segments)
        return packed_qkv_attention(qkv.unflatten(1, (3, self.heads, -1)), segments, backend, rotation).flatten(1)

    def wants_groups(self, segments: Segments) -> bool:
        """Return whether attention runs one call per length, so that sorting images by length first saves time."""
        # Not self.qkv.weight: at ZeRO stage 3 DeepSpeed gathers what is read by name, and ranks read at different
        # times.
        return self._backend(next(self.qkv.parameters()), segments) in GROUPED

    def _backend(self, like: Tensor, segments: Segments) -> str:
        head = self.proj.in_features // self.heads
        gradients = torch.is_grad_enabled() and like.requires_grad
        return choose_backend(self.attention, like.device, segments, self.heads, head, like.dtype, gradients=gradients)
