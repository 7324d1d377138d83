"""The conditioned MLP on Triton's kernels, forward and backward, in chunks of tokens whose hidden stays in L2.

The (N, H) hidden activations are never kept: a chunk's are made, used and overwritten by the next chunk's, and the
backward pass makes them again. Gradients of weights and of the images' biases are summed over the chunks in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _launch as launch
from ._candidates import Choice
from ._tuning import tuner

__all__ = ["Gradients", "backward", "forward", "l2_bytes"]

# Share of L2 that a chunk's hidden activations may take; the weights and the chunk's other tensors need the rest.
_L2_SHARE = 0.5
# L2 where the device does not say: Triton's interpreter has none, and small chunks there mean that tests meet several.
_INTERPRETER_L2 = 2**16
_SMALLEST_CHUNK = 64


@dataclass(frozen=True)
class Gradients:
    """Of every input of the operator that wants one, in the inputs' types; None where there was no such input."""

    x: Tensor
    w_in: Tensor | None = None
    b_in: Tensor | None = None
    w_out: Tensor | None = None
    b_out: Tensor | None = None
    action: Tensor | None = None
    w_action: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


@dataclass(frozen=True)
class _Sums:
    """Gradients of the weights, added up over the chunks in fp32; bias (B, H) is that of the images' biases."""

    w_in: Tensor
    w_out: Tensor
    bias: Tensor
    b_out: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @staticmethod
    def zeros(x: Tensor, w_in: Tensor, w_out: Tensor, images: int) -> _Sums:
        units, width, out = w_in.shape[0], w_in.shape[1], w_out.shape[0]
        shapes = ((units, width), (out, units), (images, units), (1, out), (width,), (width,))
        return _Sums(*(torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes))


def l2_bytes(x: Tensor) -> int:
    """L2 of x's device."""
    return torch.cuda.get_device_properties(x.device).L2_cache_size if x.is_cuda else _INTERPRETER_L2


def _chunks(x: Tensor, units: int, copies: int) -> Iterator[slice]:
    """Slices of the tokens; `copies`: tensors of (chunk, H) that are alive together."""
    most = int(l2_bytes(x) * _L2_SHARE / (units * x.element_size() * copies))
    size = max(_SMALLEST_CHUNK, 1 << max(0, most.bit_length() - 1))
    for first in range(0, x.shape[0], size):
        yield slice(first, min(first + size, x.shape[0]))


def _image_bias(
    tokens: int, b_in: Tensor, action: Tensor | None, w_action: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The first product's bias, fp32 (B, H) with int32 (N,) images of the tokens, or (H,) and None without actions."""
    if action is None or w_action is None or cu_seqlens is None:
        return launch.rows_together(b_in.float()), None
    bias = torch.addmm(b_in.float(), action.float(), w_action.float().t())
    images = torch.arange(len(action), dtype=torch.int32, device=action.device)
    # The known size of the result spares the device a synchronisation with the host.
    return bias, torch.repeat_interleave(images, cu_seqlens.diff(), output_size=tokens)


def _affine(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if weight is None or bias is None else (launch.rows_together(weight), launch.rows_together(bias))


def forward(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """The operator's value, (N, Do)."""
    x = launch.rows_together(x)
    out = torch.empty(x.shape[0], w_out.shape[0], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    bias, image = _image_bias(x.shape[0], b_in, action, w_action, cu_seqlens)
    b_out = launch.rows_together(b_out.float())
    norm = _affine(norm_weight, norm_bias)

    def call(choice: Choice) -> Tensor:
        if choice.by == "fused":
            return launch.fused_mlp(
                x, w_in, bias, image, w_out, b_out, norm, out,
                residual=residual, eps=eps, activation=activation, choice=choice,
            )  # fmt: skip
        for rows in _chunks(x, w_in.shape[0], 1):
            tokens = x[rows]
            normed = tokens if norm is None else launch.normalise(tokens, *norm, eps)
            hidden = torch.empty(tokens.shape[0], w_in.shape[0], dtype=x.dtype, device=x.device)
            images = None if image is None else image[rows]
            launch.linear(normed, w_in, bias, hidden, image=images, activation=activation)
            launch.linear(hidden, w_out, b_out, out[rows], residual=tokens if residual else None)
        return out

    sizes = (x.shape[0], w_in.shape[0], x.shape[1])
    fusable = out.shape == x.shape and x.element_size() == 2
    return tuner(x.device).run(f"forward {x.shape[1] if fusable else 'wide'}", x.dtype, sizes, call)


def backward(
    grad: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str, weights: bool,
) -> Gradients:  # fmt: skip
    """Every gradient for the incoming one, grad (N, Do); without `weights`, that of x alone."""
    x, grad = launch.rows_together(x), launch.rows_together(grad)
    sums = _Sums.zeros(x, w_in, w_out, 1 if action is None else action.shape[0]) if weights else None
    norm = _affine(norm_weight, norm_bias)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        bias, image = _image_bias(x.shape[0], b_in, action, w_action, cu_seqlens)
        if sums is not None:
            launch.segment_sum(grad, None, sums.b_out)
    for rows in _chunks(x, w_in.shape[0], 2):
        tokens, dout = x[rows], grad[rows]
        normed = tokens if norm is None else launch.normalise(tokens, *norm, eps)
        hidden, dhidden = launch.hidden_backward(
            normed, w_in, bias, None if image is None else image[rows], dout, w_out, activation
        )
        if sums is not None:
            sums.w_out.add_(launch.weight_grad(dout, hidden))
            sums.w_in.add_(launch.weight_grad(dhidden, normed))
            bounds = None if cu_seqlens is None else (cu_seqlens - rows.start).clamp(0, tokens.shape[0])
            launch.segment_sum(dhidden, bounds, sums.bias)
        passed = dout if residual else None
        if norm is None:
            launch.linear(dhidden, w_in.t(), None, dx[rows], residual=passed)
            continue
        dnormed = torch.empty(tokens.shape, dtype=torch.float32, device=x.device)
        launch.linear(dhidden, w_in.t(), None, dnormed)
        dweight, dshift = launch.norm_backward(dnormed, tokens, norm[0], passed, dx[rows], eps)
        if sums is not None:
            sums.norm_weight.add_(dweight)
            sums.norm_bias.add_(dshift)
    if sums is None:
        return Gradients(x=dx)
    return Gradients(
        x=dx,
        w_in=sums.w_in.to(w_in.dtype),
        b_in=sums.bias.sum(dim=0).to(b_in.dtype),
        w_out=sums.w_out.to(w_out.dtype),
        b_out=sums.b_out[0].to(b_out.dtype),
        action=None if action is None or w_action is None else (sums.bias @ w_action.float()).to(action.dtype),
        w_action=None if action is None or w_action is None else (sums.bias.t() @ action.float()).to(w_action.dtype),
        norm_weight=None if norm_weight is None else sums.norm_weight.to(norm_weight.dtype),
        norm_bias=None if norm_bias is None else sums.norm_bias.to(norm_bias.dtype),
    )
