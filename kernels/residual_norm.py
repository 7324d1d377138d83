"""The residual stream and its LayerNorm, fused forward and backward.

    s = x + branch, or x itself without a branch
    n = LN(s) · weight + bias

x, branch (N, D); weight, bias (D,). Statistics and sums are fp32 for half-precision inputs; s is rounded to their dtype
before it is normalised.

Fused (Triton): forward, sum and LayerNorm with one read of both. Backward, one kernel takes both gradients: that of n
goes through the LayerNorm, that of s is added before the only rounding; the gradients of weight and bias are summed at
the same time in two ordered stages: equal inputs give equal bits. Mean and std are recomputed from s. Without a branch
nothing is added or copied forward: x is returned as it is. Saved are the kernel in which autograd would add x's two
gradients, and a second read for the gradients of weight and bias.

Reference (plain PyTorch, below): the addition and `layer_norm`.

FLOPs and bytes: `residual_norm_flops`, `residual_norm_bytes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import autocast_type, resolve_backend, without_autocast
from ._lib.checks import check_eps, check_floating, check_like, check_shape
from ._lib.norms import norm_backward, normalise
from ._lib.rows import launching, rows_together
from ._lib.slices import add_slices

__all__ = ["residual_norm", "residual_norm_bytes", "residual_norm_flops", "residual_norm_reference"]


def residual_norm_flops(tokens: int, width: int, *, branch: bool = True, backward: bool = False) -> int:
    """Return FLOPs of one pass, one per element and operation; the backward pass without recomputation.

    Forward: mean, centring, square, variance, scaling, weight, bias, and the branch's addition. Backward: weight; means
    of g and g · x̂ (3); the gradients of weight (2) and bias; dx of them (4), and the addition of s's.
    """
    if backward:
        return tokens * width * 12
    return tokens * width * (8 if branch else 7)


def residual_norm_bytes(
    tokens: int, width: int, *, branch: bool = True, backward: bool = False, element: int = 2
) -> int:
    """Return minimum bytes moved by one pass: forward x and branch read, s and n written; or x read and n written.

    Backward: both gradients and s read, one written; weight read, its gradient and bias's written.
    """
    if backward:
        return element * (4 * tokens * width + 3 * width)
    return element * ((4 if branch else 2) * tokens * width + 2 * width)


def residual_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute `residual_norm` with PyTorch's operators. Arguments are not checked."""
    total = x if branch is None else x + branch
    return total, F.layer_norm(total, (total.shape[1],), weight, bias, eps)


@torch.library.custom_op("iwm_fast::residual_norm", mutates_args=())
def _operator(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return s (N, D), or (0, D) without a branch, and n (N, D)."""
    total = torch.empty(x.shape[0] if branch is not None else 0, x.shape[1], dtype=x.dtype, device=x.device)
    if not x.numel():
        return total, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with launching(x):
        normed = normalise(
            rows_together(x), rows_together(weight), rows_together(bias), eps,
            branch=None if branch is None else rows_together(branch), total=None if branch is None else total,
        )  # fmt: skip
    return total, normed


@_operator.register_fake
def _(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if branch is None else x.shape[0], x.shape[1]), x.new_empty(x.shape)


@torch.library.custom_op("iwm_fast::residual_norm_backward", mutates_args=())
def _backward_operator(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of s (N, D), and of weight and bias (2, D), given those of n and, if any, of s."""
    grad = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if not total.numel():
        return grad, weight.new_zeros(2, weight.shape[0])
    with launching(total):
        sums = norm_backward(
            rows_together(dnormed), rows_together(total), rows_together(weight),
            None if dtotal is None else rows_together(dtotal), grad, eps,
        )  # fmt: skip
        added = add_slices(sums, weight.dtype)
    return grad, added


@_backward_operator.register_fake
def _(dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(2, total.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, weight, _, ctx.eps = inputs
    ctx.has_branch = branch is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if ctx.has_branch else x, weight)


def _gradients(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients of x, branch, weight, bias and eps. If only s is used, its gradient passes unchanged."""
    grad, dweight, dbias = dtotal, None, None
    if dnormed is not None:
        grad, sums = torch.ops.iwm_fast.residual_norm_backward(dnormed, dtotal, *ctx.saved_tensors, ctx.eps)
        dweight, dbias = sums.unbind()
    return grad, grad if ctx.has_branch else None, dweight, dbias, None


def _differentiate(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without a branch the first result has no rows and needs no gradient.
    return _gradients(ctx, dtotal if ctx.has_branch else None, dnormed)


_operator.register_autograd(_differentiate, setup_context=_keep)


class _Beside(torch.autograd.Function):
    """Return x and n from one node, which adds x's two gradients; an operator may not return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        outputs = torch.ops.iwm_fast.residual_norm(x, branch, weight, bias, eps)
        _keep(ctx, (x, branch, weight, bias, eps), outputs)
        return x.view_as(x), outputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *grads)


@register_flop_formula(torch.ops.iwm_fast.residual_norm)
def _forward_flops(x: Any, branch: Any, *_: Any, **__: Any) -> int:
    return residual_norm_flops(*x, branch=branch is not None)


@register_flop_formula(torch.ops.iwm_fast.residual_norm_backward)
def _backward_flops(dnormed: Any, *_: Any, **__: Any) -> int:
    return residual_norm_flops(*dnormed, backward=True)


def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the residual stream s = x + branch, and LN(s) · weight + bias.

    Args:
        x: (N, D), any floating dtype; N may be 0.
        branch: (N, D) of x's dtype, what a block adds to the stream; or None: s is x. Use s in x's place, so that its
            gradient meets the LayerNorm's in one kernel.
        weight: (D,) of x's dtype.
        bias: (D,) of x's dtype.
        eps: added to the variance.
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else the reference.

    Under autocast all arguments are cast to its dtype first, except float64; statistics and sums stay fp32. The
    Triton backend has no second derivative: it raises RuntimeError.

    Returns:
        s and its LayerNorm, (N, D) each, of x's dtype, or of autocast's.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; the message begins with its name.

    """
    check_eps(eps)
    check_floating("x", x, 2)
    wanted = autocast_type(x)
    if wanted is not None:
        x, weight, bias = (t.to(wanted) for t in (x, weight, bias))
        branch = None if branch is None else branch.to(wanted)
    if branch is not None:
        check_shape("branch", branch, tuple(x.shape), "x's shape, (N, D)")
        check_like("branch", branch, "x", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[1],), "(D,)")
        check_like(name, tensor, "x", x)
    if resolve_backend(backend, "x", x) == "reference":
        with without_autocast(x):
            return residual_norm_reference(x, branch, weight, bias, eps=eps)
    total: Tensor
    normed: Tensor
    if branch is None:
        total, normed = _Beside.apply(x, branch, weight, bias, eps)
    else:
        total, normed = torch.ops.iwm_fast.residual_norm(x, branch, weight, bias, eps)
    return total, normed
