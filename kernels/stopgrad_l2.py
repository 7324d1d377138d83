"""Squared L2 distance to a target without gradient, whose rows are gathered and layer-normalised.

    loss = scale · Σ_n ‖ pred[n] − [LN](target[index[n]]) ‖²

pred (N, D); target (M, D); index (N,) int64 or None. A row n with index[n] = -1 has no target: it is left out of the
sum and its gradient is 0. Arithmetic is fp32 for half-precision inputs.

Fused (Triton): gather, normalisation, difference, square and sum, and, if pred requires one, the gradient
2 · scale · (pred − target), from one read of pred and of its target rows. The sum has two ordered stages: equal inputs
give equal bits. The gradient is written for an upstream gradient of 1, which is what the backward pass gets, so that
pass is free. For any other upstream gradient (a loss scale, say) it is recomputed from pred and target: a gradient
already rounded to half cannot be scaled without rounding twice or underflowing in fp16. A compiled graph computes it in
the backward pass only.

Reference (plain PyTorch, below): saves the fp32 difference for the backward pass, and nothing if no gradient is
required.

FLOPs and bytes: `stopgrad_l2_flops`, `stopgrad_l2_bytes`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import autocast_type, resolve_backend, without_autocast
from ._lib.checks import check_eps, check_floating, check_index, check_like, check_shape, looked_at
from ._lib.jit import to_type
from ._lib.norms import row_statistics
from ._lib.once import once_differentiable
from ._lib.rows import launching, rows_in_warps, rows_together

__all__ = ["stopgrad_l2", "stopgrad_l2_bytes", "stopgrad_l2_flops", "stopgrad_l2_reference"]

_REDUCTIONS = ("mean", "token_mean", "sum")
# Programs of a launch that may find nothing to do: about four per multiprocessor of a large GPU.
_FEW_PROGRAMS = 512


def stopgrad_l2_flops(tokens: int, width: int, *, normalize_target: bool = False) -> int:
    """Return FLOPs, gradient included: difference, square, sum and scaling; five more for the normalisation."""
    return tokens * width * (9 if normalize_target else 4)


def stopgrad_l2_bytes(tokens: int, width: int, *, element: int = 2, indexed: bool = True, gradient: bool = True) -> int:
    """Return minimum bytes moved: pred and its target rows read once, the gradient written once.

    `element`: bytes per element.
    """
    return tokens * (width * element * (3 if gradient else 2) + (8 if indexed else 0))


def _difference(pred: Tensor, target: Tensor, index: Tensor | None, normalize_target: bool, eps: float) -> Tensor:
    """Return pred − [LN](target[index]), (N, D), in fp32 or better."""
    exact = torch.promote_types(pred.dtype, torch.float32)
    absent = _without_target(index)
    if absent is not None and index is not None:
        index = index.clamp(min=0)
    rows = target if index is None else target.index_select(0, index)
    rows = rows.to(exact)
    if normalize_target:
        rows = F.layer_norm(rows, (rows.shape[1],), eps=eps)
    difference = pred.to(exact) - rows
    return difference if absent is None else difference.masked_fill(absent, 0.0)


def _without_target(index: Tensor | None) -> Tensor | None:
    """Return bool (N, 1), True where a row has no target; None if values on the CPU show that all rows have one."""
    if index is None or (looked_at(index) and int(index.numpy().min()) >= 0):
        return None
    return (index == -1)[:, None]


class _StopGradL2(torch.autograd.Function):
    """Sum of squares that saves the gradient's numerator; the gradient goes to `pred` only."""

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
    @once_differentiable("stopgrad_l2")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        # The upstream gradient may be a loss scale: multiply before the cast, or small gradients underflow in half.
        return (difference * (grads[0] * (2 * ctx.scale))).to(ctx.dtype), None, None, None, None, None


def _factor(pred: Tensor, reduction: str, scale: float) -> float:
    """Return the factor of Σ‖·‖² for reduction and scale; any finite number for an empty sum."""
    if reduction == "sum":
        return scale
    return scale / max(pred.shape[0] if reduction == "token_mean" else pred.numel(), 1)


def stopgrad_l2_reference(
    pred: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    normalize_target: bool = False,
    reduction: str = "mean",
    scale: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Compute `stopgrad_l2` with PyTorch's operators. Arguments are not checked."""
    factor = _factor(pred, reduction, scale)
    target = target.detach()
    if pred.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _StopGradL2.apply(pred, target, index, normalize_target, factor, eps)
    return _difference(pred, target, index, normalize_target, eps).square().sum() * factor


@triton.jit(do_not_specialize=["N", "M", "ROWS", "index_ptr"])
@no_type_check
def distance_kernel(
    pred_ptr, target_ptr, index_ptr, incoming_ptr, sums_ptr, grad_ptr,
    N, M, D, ROWS,
    stride_pn, stride_tm, stride_gn,
    scale, eps,
    HAS_INDEX: tl.constexpr, NORMALIZE: tl.constexpr, WRITE_SUM: tl.constexpr, WRITE_GRAD: tl.constexpr,
    HAS_INCOMING: tl.constexpr, SKIP_ONE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write sums (programs,) fp32: Σ‖pred − [LN](target[index])‖² of ROWS rows each; and grad (N, D).

    grad is 2 · scale · difference. ROWS is a multiple of BLOCK_N. incoming (1,) fp32 multiplies the gradient; with
    SKIP_ONE an incoming 1 leaves grad unchanged. A target row out of range counts as NaN. Index -1: no distance, and a
    gradient of 0.
    """
    i = tl.program_id(0)
    factor = 2.0 * scale
    if HAS_INCOMING:
        incoming = tl.load(incoming_ptr)
        factor = factor * incoming
        if SKIP_ONE:
            if incoming == 1.0:
                return
    o_d = tl.arange(0, BLOCK_D)
    distance = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(i * ROWS, min(i * ROWS + ROWS, N), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        rows = o_n.to(tl.int64)
        wanted = rows
        m_l = m_n
        if HAS_INDEX:
            wanted = tl.load(index_ptr + o_n, mask=m_n, other=0)
            m_l = m_n & (wanted != -1)
        m_t = m_n & (wanted >= 0) & (wanted < M)
        # Issue all loads of a row before any store of its gradient.
        targets = ()
        preds = ()
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            p_target = target_ptr + wanted[:, None] * stride_tm + o[None, :]
            m_d = (o < D)[None, :]
            targets = targets + (tl.load(p_target, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32),)
            p_pred = pred_ptr + rows[:, None] * stride_pn + o[None, :]
            preds = preds + (tl.load(p_pred, mask=m_n[:, None] & m_d, other=0.0).to(tl.float32),)
        if NORMALIZE:
            shift, gain = row_statistics(targets, D, eps, BLOCK_D, PARTS)
        else:
            shift = tl.zeros((BLOCK_N,), tl.float32)
            gain = tl.full((BLOCK_N,), 1.0, tl.float32)
        gain = tl.where(m_t | (o_n >= N), gain, float("nan"))
        for part in tl.static_range(PARTS):
            o = part * BLOCK_D + o_d
            m = m_n[:, None] & (o < D)[None, :]
            m_lost = m_l[:, None] & (o < D)[None, :]
            difference = tl.where(m_lost, preds[part] - (targets[part] - shift[:, None]) * gain[:, None], 0.0)
            if WRITE_SUM:
                distance += difference * difference
            if WRITE_GRAD:
                p_grad = grad_ptr + rows[:, None] * stride_gn + o[None, :]
                tl.store(p_grad, to_type(difference * factor, grad_ptr.dtype.element_ty), mask=m)
    if WRITE_SUM:
        tl.store(sums_ptr + i, tl.sum(tl.sum(distance, axis=1), axis=0))


@triton.jit(do_not_specialize=["COUNT"])
@no_type_check
def total_kernel(sums_ptr, out_ptr, COUNT, scale, BLOCK: tl.constexpr):
    """Write out (1,) = scale · Σ sums fp32 (COUNT,), in fp64 and in a fixed order; one program."""
    acc = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, COUNT, BLOCK):
        o = first + tl.arange(0, BLOCK)
        acc += tl.load(sums_ptr + o, mask=o < COUNT, other=0.0).to(tl.float64)
    tl.store(out_ptr, (tl.sum(acc, axis=0) * scale).to(tl.float32))


def launch_distance(
    pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float, eps: float, *,
    sums: Tensor | None = None, grad: Tensor | None = None, incoming: Tensor | None = None, skip_one: bool = False,
) -> None:  # fmt: skip
    """Launch `distance_kernel`, writing `sums`, `grad` or both."""
    rows, width = pred.shape
    pred, target = rows_together(pred), rows_together(target)
    block_n, block_d, parts, warps = rows_in_warps(width, pred.element_size())
    # A launch that may have nothing to do uses few programs; others use one per block of rows.
    depth = block_n * (triton.cdiv(triton.cdiv(rows, block_n), _FEW_PROGRAMS) if skip_one else 1)
    with launching(pred):
        distance_kernel[(triton.cdiv(rows, depth),)](
            pred_ptr=pred, target_ptr=target, index_ptr=None if index is None else rows_together(index),
            incoming_ptr=incoming, sums_ptr=sums, grad_ptr=grad,
            N=rows, M=target.shape[0], D=width, ROWS=depth,
            stride_pn=pred.stride(0), stride_tm=target.stride(0), stride_gn=0 if grad is None else grad.stride(0),
            scale=scale, eps=eps,
            HAS_INDEX=index is not None, NORMALIZE=normalize, WRITE_SUM=sums is not None, WRITE_GRAD=grad is not None,
            HAS_INCOMING=incoming is not None, SKIP_ONE=skip_one,
            BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=warps,
        )  # fmt: skip


def launch_total(sums: Tensor, scale: float, out: Tensor) -> None:
    """Launch `total_kernel`, which writes scale · Σ sums to out, fp32 of one element."""
    with launching(sums):
        total_kernel[(1,)](sums_ptr=sums, out_ptr=out, COUNT=len(sums), scale=scale, BLOCK=1024, num_warps=4)


@torch.library.custom_op("iwm_fast::stopgrad_l2", mutates_args=())
def _operator(
    pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss, fp32, and its gradient (N, D), or (0, D) if none is required."""
    grad = torch.empty(pred.shape[0] if with_grad else 0, pred.shape[1], dtype=pred.dtype, device=pred.device)
    if not pred.numel():
        return pred.new_zeros((), dtype=torch.float32), grad
    block_n = rows_in_warps(pred.shape[1], pred.element_size())[0]
    sums = torch.empty(triton.cdiv(pred.shape[0], block_n), dtype=torch.float32, device=pred.device)
    launch_distance(pred, target, index, normalize, scale, eps, sums=sums, grad=grad if with_grad else None)
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    launch_total(sums, scale, loss)
    return loss, grad


@_operator.register_fake
def _(
    pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    rows = pred.shape[0] if with_grad else 0
    return pred.new_empty((), dtype=torch.float32), pred.new_empty(rows, pred.shape[1])


@torch.library.custom_op("iwm_fast::stopgrad_l2_backward", mutates_args=())
def _backward_operator(
    incoming: Tensor, pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float, eps: float
) -> Tensor:
    """Return the loss's gradient times `incoming`, (N, D), from pred and target."""
    grad = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if grad.numel():
        factor = incoming.float().reshape(1)
        launch_distance(pred, target, index, normalize, scale, eps, grad=grad, incoming=factor)
    return grad


@_backward_operator.register_fake
def _(incoming: Tensor, pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)


@torch.library.custom_op("iwm_fast::stopgrad_l2_scale_", mutates_args=("grad",))
def _scale_operator(
    grad: Tensor, incoming: Tensor, pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, scale: float,
    eps: float,
) -> None:  # fmt: skip
    """Multiply `grad` (N, D), the loss's gradient, by `incoming`; an incoming 1 leaves it untouched."""
    if grad.numel():
        factor = incoming.float().reshape(1)
        launch_distance(pred, target, index, normalize, scale, eps, grad=grad, incoming=factor, skip_one=True)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, target, index, *ctx.options, with_grad = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, target, index)
    # Not a saved tensor: the first backward pass returns it, and a second one computes its own.
    ctx.grad = output[1] if with_grad else None


def _differentiate(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if incoming is None:
        return (None, *nothing)
    saved = (*ctx.saved_tensors, *ctx.options)
    grad, ctx.grad = ctx.grad, None
    # A traced graph may not write into what its forward pass returned: recompute there too. So too for
    # create_graph=True: that operator reports that it has no derivative.
    if grad is None or torch.is_grad_enabled() or type(incoming) is not Tensor:
        return (torch.ops.iwm_fast.stopgrad_l2_backward(incoming, *saved), *nothing)
    torch.ops.iwm_fast.stopgrad_l2_scale_(grad, incoming, *saved)
    return (grad, *nothing)


_operator.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.iwm_fast.stopgrad_l2)
def _count(pred: Any, target: Any, index: Any, normalize: bool, *_: Any, **__: Any) -> int:
    return stopgrad_l2_flops(*pred, normalize_target=normalize)


def stopgrad_l2(
    pred: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    normalize_target: bool = False,
    reduction: str = "mean",
    scale: float = 1.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Return Σ‖pred − [LN](target[index])‖², reduced; the gradient goes to `pred` only, even if `target` requires one.

    Args:
        pred: (N, D), any floating dtype; N may be 0, which gives 0.
        target: (M, D), of pred's dtype.
        index: (N,) int64, the row of `target` for each prediction; None: N = M. -1, with reduction "sum" only: no
            target for this prediction, which adds nothing and gets a gradient of 0. Values out of range, and -1 with
            another reduction, are checked on the CPU only (elsewhere that would synchronise).
        normalize_target: layer-normalise each target row, without affine parameters.
        reduction: "mean" over N · D, "token_mean" over N, or "sum".
        scale: multiplies the loss. Pass factors known before the backward pass here, where they are free, instead of
            multiplying the loss.
        eps: added to the variance of the normalisation.
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else the reference.

    Under autocast, which gives matmuls in half and normalisations in fp32, pred and target may have two dtypes: both
    are cast to the wider one. Arithmetic is fp32 regardless. The result is differentiable once:
    a second derivative raises RuntimeError.

    Returns:
        A scalar, fp32 (float64 for float64 predictions).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; the message begins with its name.

    """
    check_eps(eps)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(_REDUCTIONS)}")
    check_floating("pred", pred, 2)
    check_floating("target", target, 2)
    if pred.dtype != target.dtype and autocast_type(pred) is not None:
        wider = torch.promote_types(pred.dtype, target.dtype)
        pred, target = pred.to(wider), target.to(wider)
    check_like("target", target, "pred", pred)
    if index is None:
        check_shape("target", target, tuple(pred.shape), "pred's shape without index, (N, D)")
    else:
        check_shape("target", target, (target.shape[0], pred.shape[1]), "(M, D)")
        lowest = -1 if reduction == "sum" else 0
        check_index("index", index, pred.shape[0], "(N,)", "target", target, target.shape[0], lowest)
    if resolve_backend(backend, "pred", pred) == "triton":
        with_grad = pred.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        options = (normalize_target, _factor(pred, reduction, scale), eps, with_grad)
        loss: Tensor = torch.ops.iwm_fast.stopgrad_l2(pred, target.detach(), index, *options)[0]
        return loss
    with without_autocast(pred):
        return stopgrad_l2_reference(
            pred, target, index=index, normalize_target=normalize_target, reduction=reduction, scale=scale, eps=eps
        )
