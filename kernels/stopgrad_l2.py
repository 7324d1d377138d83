"""Squared L2 distance to a target that is never differentiated, with the target's rows gathered and normalised.

    loss = scale · Σ_n ‖ pred[n] − [LN](target[index[n]]) ‖²

pred (N, D); target (M, D); index (N,) int64 or None. The gradient, 2 · scale · (pred − target), comes from the same
pass as the loss: what is kept for the backward pass is the difference, in fp32 (float64 for float64 predictions), and
nothing is kept where no gradient is asked for. All arithmetic is fp32 for half inputs.

Operations and bytes: `stopgrad_l2_flops`, `stopgrad_l2_bytes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_backend, check_eps, check_floating, check_like, check_shape

__all__ = ["stopgrad_l2", "stopgrad_l2_bytes", "stopgrad_l2_flops", "stopgrad_l2_reference"]

_REDUCTIONS = ("mean", "token_mean", "sum")


def stopgrad_l2_flops(tokens: int, width: int, *, normalize_target: bool = False) -> int:
    """Operations, gradient included: difference, square, sum and scaling; the normalisation's five more."""
    return tokens * width * (9 if normalize_target else 4)


def stopgrad_l2_bytes(tokens: int, width: int, *, element: int = 2, indexed: bool = True, gradient: bool = True) -> int:
    """Fewest bytes moved: pred and its target rows read once, the gradient written once.

    `element` is the bytes of one number.
    """
    return tokens * (width * element * (3 if gradient else 2) + (8 if indexed else 0))


def _difference(pred: Tensor, target: Tensor, index: Tensor | None, normalize_target: bool, eps: float) -> Tensor:
    """Compute pred − [LN](target[index]), (N, D), in fp32 or better."""
    exact = torch.promote_types(pred.dtype, torch.float32)
    rows = target if index is None else target.index_select(0, index)
    rows = rows.to(exact)
    if normalize_target:
        rows = F.layer_norm(rows, (rows.shape[1],), eps=eps)
    return pred.to(exact) - rows


class _StopGradL2(torch.autograd.Function):
    """Sum of squares with the gradient's numerator kept; gradient to `pred` alone."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float, eps: float
    ) -> Tensor:
        difference = _difference(pred, target, index, normalize, eps)
        ctx.save_for_backward(difference)
        ctx.scale = scale
        ctx.dtype = pred.dtype
        return difference.square().sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        # The incoming gradient may be a loss scale: it is applied before the cast, or small gradients vanish in half.
        return (difference * (grads[0] * (2 * ctx.scale))).to(ctx.dtype), None, None, None, None, None


def _scale(pred: Tensor, reduction: str) -> float:
    """The factor of Σ‖·‖² that the reduction means; of an empty sum, any finite number."""
    if reduction == "sum":
        return 1.0
    return 1.0 / max(pred.shape[0] if reduction == "token_mean" else pred.numel(), 1)


def stopgrad_l2_reference(
    pred: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    normalize_target: bool = False,
    reduction: str = "mean",
    eps: float = 1e-6,
) -> Tensor:
    """What `stopgrad_l2` computes, in PyTorch's own operators. Arguments are not checked."""
    scale = _scale(pred, reduction)
    target = target.detach()
    if pred.requires_grad and torch.is_grad_enabled():
        return _StopGradL2.apply(pred, target, index, normalize_target, scale, eps)
    return _difference(pred, target, index, normalize_target, eps).square().sum() * scale


def stopgrad_l2(
    pred: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    normalize_target: bool = False,
    reduction: str = "mean",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Σ‖pred − [LN](target[index])‖², reduced; the gradient goes to `pred` only, whatever `target` requires.

    Args:
        pred: (N, D), any floating type; N may be 0, which gives 0.
        target: (M, D), of pred's type.
        index: (N,) int64, the row of `target` for each prediction; None: N = M. Rows out of range are found on the CPU
            only (elsewhere that would wait for the device).
        normalize_target: layer-normalise each target row, without affine.
        reduction: "mean" over N · D, "token_mean" over N, or "sum".
        eps: added to the variance of the normalisation.
        backend: "auto" or "reference"; "triton" is not built in this version.

    Returns:
        A scalar, fp32 (float64 for float64 predictions).

    Raises:
        ValueError: an argument is of the wrong shape, type or device; its name comes first.

    """
    check_backend(backend)
    check_eps(eps)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(_REDUCTIONS)}")
    check_floating("pred", pred, 2)
    check_floating("target", target, 2)
    check_like("target", target, "pred", pred)
    if index is None:
        check_shape("target", target, tuple(pred.shape), "pred's shape without index, (N, D)")
    else:
        check_shape("target", target, (target.shape[0], pred.shape[1]), "(M, D)")
        check_shape("index", index, (pred.shape[0],), "(N,)")
        check_like("index", index, "pred", pred, dtype=torch.int64)
        if index.device.type == "cpu" and index.numel():
            low, high = (int(v) for v in torch.aminmax(index))
            if low < 0 or high >= target.shape[0]:
                raise ValueError(f"index spans {low} to {high}; target has rows 0 to {target.shape[0] - 1}")
    return stopgrad_l2_reference(
        pred, target, index=index, normalize_target=normalize_target, reduction=reduction, eps=eps
    )
