"""The conditioned MLP's forward and backward pass, on Triton's kernels.

The (N, H) hidden activations are not saved: the backward pass recomputes them. If they would exceed `workspace` bytes,
tokens are processed in chunks, and the gradients of weights and of the images' biases are summed over the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iwm_fast.kernels._lib.norms import norm_backward, normalise
from iwm_fast.kernels._lib.rows import rows_together
from iwm_fast.kernels._lib.slices import add_gradients, add_pairs, add_slices

from .hidden_backward import hidden_backward
from .image_sums import action_gradients, column_sums, image_of_rows, segment_sums
from .linear import linear
from .operands import Bias, image_bias, takes_action
from .weight_grad import weight_grad_slices
from .workspace import chunk_rows

__all__ = ["Gradients", "backward", "forward"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the operator's inputs that require one, in the inputs' dtypes; None for absent inputs."""

    x: Tensor
    w_in: Tensor | None = None
    b_in: Tensor | None = None
    w_out: Tensor | None = None
    b_out: Tensor | None = None
    action: Tensor | None = None
    w_action: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def _chunks(x: Tensor, units: int, copies: int, workspace: int) -> Iterator[slice]:
    size = chunk_rows(x.shape[0], units, x.element_size(), copies, workspace)
    for first in range(0, x.shape[0], size):
        yield slice(first, min(first + size, x.shape[0]))


def _bias(tokens: int, b_in: Tensor, action: Tensor | None, w_action: Tensor | None, cu_seqlens: Tensor | None) -> Bias:
    """Return what is added to the first matmul: the action, if the kernel can multiply it; else a bias per image."""
    b_in = rows_together(b_in)
    if action is None or w_action is None or cu_seqlens is None:
        return Bias(b_in)
    image = image_of_rows(tokens, cu_seqlens)
    action, w_action = rows_together(action), rows_together(w_action)
    if takes_action(action):
        return Bias(b_in, image, action, w_action)
    return Bias(image_bias(b_in, action, w_action), image)


def _together(bounds: Tensor | None) -> Tensor | None:
    return None if bounds is None else rows_together(bounds)


def _affine(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if weight is None or bias is None else (rows_together(weight), rows_together(bias))


def _weights(w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights with contiguous rows; a transposed view's are copied."""
    return rows_together(w_in), rows_together(w_out)


def forward(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str, workspace: int,
) -> Tensor:  # fmt: skip
    """Return the operator's output, (N, Do)."""
    x, cu_seqlens = rows_together(x), _together(cu_seqlens)
    out = torch.empty(x.shape[0], w_out.shape[0], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    w_in, w_out = _weights(w_in, w_out)
    bias = _bias(x.shape[0], b_in, action, w_action, cu_seqlens)
    out_bias = Bias(rows_together(b_out))
    norm = _affine(norm_weight, norm_bias)
    for rows in _chunks(x, w_in.shape[0], 1, workspace):
        tokens = x[rows]
        normed = tokens if norm is None else normalise(tokens, *norm, eps)
        hidden = torch.empty(tokens.shape[0], w_in.shape[0], dtype=x.dtype, device=x.device)
        linear(normed, w_in, bias.rows(rows), hidden, activation=activation)
        linear(hidden, w_out, out_bias, out[rows], residual=tokens if residual else None)
        del normed, hidden  # free them before the next chunk
    return out


def backward(
    grad: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str, workspace: int, weights: bool,
) -> Gradients:  # fmt: skip
    """Return every gradient, given the upstream one, grad (N, Do); without `weights`, that of x alone."""
    x, grad, cu_seqlens = rows_together(x), rows_together(grad), _together(cu_seqlens)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        inputs = (w_in, b_in, w_out, b_out, action, w_action, norm_weight, norm_bias)
        zeros = (
            None if t is None or not weights else torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in inputs
        )
        return Gradients(dx, *zeros)
    w_in, w_out = _weights(w_in, w_out)
    bias = _bias(x.shape[0], b_in, action, w_action, cu_seqlens)
    norm = _affine(norm_weight, norm_bias)
    chunks = list(_chunks(x, w_in.shape[0], 2, workspace))
    bounds = cu_seqlens if action is not None else None
    sums = _Sums(x, w_in, bounds, chunked=len(chunks) > 1) if weights else None
    for rows in chunks:
        tokens, dout = x[rows], grad[rows]
        normed = tokens if norm is None else normalise(tokens, *norm, eps)
        hidden, dhidden = hidden_backward(normed, w_in, bias.rows(rows), dout, w_out, activation)
        if sums is not None:
            sums.add(rows, normed, hidden, dhidden, dout)
        del normed, hidden
        passed = dout if residual else None
        if norm is None:
            linear(dhidden, w_in.t(), None, dx[rows], residual=passed)
            del dhidden
            continue
        dnormed = torch.empty(tokens.shape, dtype=torch.float32, device=x.device)
        linear(dhidden, w_in.t(), None, dnormed)
        del dhidden
        parts = norm_backward(dnormed, tokens, norm[0], passed, dx[rows], eps)
        if sums is not None:
            sums.norm.append(sums.parts(parts))
        del dnormed, parts
    if sums is None:
        return Gradients(x=dx)
    return sums.gradients(dx, w_in, b_in, w_out, b_out, action, w_action, norm_weight)


class _Sums:
    """Partial gradients of the weights, fp32, accumulated over chunks."""

    def __init__(self, x: Tensor, w_in: Tensor, cu_seqlens: Tensor | None, *, chunked: bool) -> None:
        self.bounds, self.chunked = cu_seqlens, chunked
        # Tensor cores would round fp32 operands to TF32 in the column sums, so those are summed separately.
        self.beside = x.element_size() == 2
        self.w_in: Tensor | None = None  # (S, ...): one chunk's slices, or the sum of several chunks
        self.w_out: Tensor | None = None
        self.image_bias: Tensor | None = None  # (images, H)
        if cu_seqlens is not None:
            images = len(cu_seqlens) - 1
            self.image_bias = torch.empty(images, w_in.shape[0], dtype=torch.float32, device=x.device)
        self.b_in: list[Tensor] = []
        self.b_out: list[Tensor] = []
        self.norm: list[Tensor] = []

    def add(self, rows: slice, normed: Tensor, hidden: Tensor, dhidden: Tensor, dout: Tensor) -> None:
        """Add a chunk's gradients."""
        per_image = self.bounds is not None
        w_out = weight_grad_slices(dout, hidden, bias=self.beside)
        self.w_out = self._with(w_out, self.w_out)
        del w_out  # free it before the next slices
        w_in = weight_grad_slices(dhidden, normed, bias=self.beside and not per_image)
        self.w_in = self._with(w_in, self.w_in)
        if not self.beside:
            self.b_out.append(self.parts(column_sums(dout)))
        if self.bounds is not None and self.image_bias is not None:
            segment_sums(dhidden, self.bounds, rows.start, self.image_bias, accumulate=rows.start > 0)
        elif not self.beside:
            self.b_in.append(self.parts(column_sums(dhidden)))

    def _with(self, slices: Tensor, before: Tensor | None) -> Tensor:
        """Return a weight's slices of one chunk, or their sum with those of earlier chunks, (1, ...).

        Not in the kernel that writes the slices: the tuner calls that many times to time it.
        """
        if not self.chunked:
            return slices
        return add_slices(slices, torch.float32, None if before is None else before[0])[None]

    def parts(self, slices: Tensor) -> Tensor:
        """Return a chunk's part of a sum: its slices, or, if more chunks follow, their sum, which takes less memory."""
        return add_slices(slices, torch.float32)[None] if self.chunked else slices

    def gradients(
        self, dx: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
        w_action: Tensor | None, norm_weight: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """Return all gradients, rounded once."""
        assert self.w_in is not None
        assert self.w_out is not None
        daction = dw_action = None
        per_image = self.image_bias is not None
        dw_in, db_in = add_gradients(self.w_in, w_in, bias=b_in if self.beside and not per_image else None)
        dw_out, db_out = add_gradients(self.w_out, w_out, bias=b_out if self.beside else None)
        if self.image_bias is not None and action is not None and w_action is not None:
            action, w_action = rows_together(action), rows_together(w_action)
            daction, dw_action, db_in = action_gradients(self.image_bias, action, w_action, b_in)
        elif db_in is None:
            db_in = add_slices(_joined(self.b_in), b_in.dtype)
        if db_out is None:
            db_out = add_slices(_joined(self.b_out), b_out.dtype)
        norm = (None, None) if norm_weight is None else add_pairs(_joined(self.norm), norm_weight.dtype)
        return Gradients(
            x=dx,
            w_in=dw_in,
            b_in=db_in,
            w_out=dw_out,
            b_out=db_out,
            action=daction,
            w_action=dw_action,
            norm_weight=norm[0],
            norm_bias=norm[1],
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
