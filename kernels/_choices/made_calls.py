"""Matmul calls on random operands, from a tuner's key: to time a choice without a batch at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels._mlp.hidden_backward import hidden_backward
from iwm_fast.kernels._mlp.linear import linear
from iwm_fast.kernels._mlp.operands import Bias
from iwm_fast.kernels._mlp.weight_grad import weight_grad_slices
from iwm_fast.kernels._tuning.candidates import Choice
from iwm_fast.kernels._tuning.tuner import Key, key_of, use_tuner

__all__ = ["made_call"]

# Tokens per image and action components where a key does not say: they hardly change the time.
_IMAGE, _ACTIONS = 196, 16


class _Grabbed:
    """Replaces the tuner: keeps the call that a matmul would make."""

    key: Key
    call: Callable[[Choice], Any]

    def run(
        self, product: str, dtype: torch.dtype, sizes: tuple[int, int, int], call: Callable[[Choice], Any], about: str
    ) -> None:
        self.key, self.call = key_of(product, dtype, sizes, about), call


def made_call(key: Key, rows: int, device: torch.device) -> Callable[[Choice], object] | None:
    """Return a key's matmul call with this many rows and normally distributed operands; None if none give that key."""
    for apart in (0, 1):
        grabbed = _Grabbed()
        with use_tuner(grabbed):
            _begin(key, _Operands(rows, apart, getattr(torch, key.dtype.partition("-")[0]), device))
        if grabbed.key == key:
            return grabbed.call
    return None


class _Operands:
    """apart: extra columns between one token row and the next, so that no descriptor can address them."""

    def __init__(self, rows: int, apart: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.apart, self.dtype, self.device = rows, apart, dtype, device
        # A generator of its own leaves the training's random state alone. Zeros would be multiplied faster.
        self.random = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def some(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed values."""
        made = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        return made if self.random is None else made.normal_(generator=self.random)

    def tokens(self, width: int) -> Tensor:
        """Return token rows (rows, width)."""
        return self.some(self.rows, width + self.apart)[:, :width]

    def bias(self, kind: str, columns: int) -> Bias | None:
        """Return a bias of a kind, as in `Bias.kind`; None for "plain"."""
        if kind == "plain":
            return None
        if kind == "row":
            return Bias(self.some(columns))
        image = torch.arange(self.rows, dtype=torch.int32, device=self.device) // _IMAGE
        images = -(-self.rows // _IMAGE)
        if kind == "image":
            return Bias(self.some(images, columns, dtype=torch.float32), image)
        return Bias(self.some(columns), image, self.some(images, _ACTIONS), self.some(columns, _ACTIONS))


def _begin(key: Key, operands: _Operands) -> None:
    """Call a key's matmul."""
    some, columns, depth = operands.some, key.columns, key.depth
    if key.product == "weight_grad":  # sizes are (rows, P, Q)
        summed = "bias" in key.about.split()
        weight_grad_slices(operands.tokens(columns), some(operands.rows, depth), bias=summed)
        return
    _, kind, *residual = key.about.split()
    x, bias = operands.tokens(depth), operands.bias(kind, columns)
    if key.product == "hidden_backward":
        assert bias is not None
        hidden_backward(
            x, some(columns, depth), bias, some(operands.rows, depth), some(depth, columns), "gelu"
        )  # fmt: skip
        return
    # Without a bias it is a gradient's matmul, with a transposed weight and an fp32 result that is accumulated.
    weight = some(columns, depth) if bias is not None else some(depth, columns).t()
    out = torch.empty(
        operands.rows, columns, dtype=torch.float32 if key.product == "plain" else x.dtype, device=x.device
    )
    linear(
        x, weight, bias, out,
        residual=some(operands.rows, columns) if residual else None,
        activation="gelu" if key.product == "hidden" else None,
    )  # fmt: skip
