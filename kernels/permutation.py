"""Permutations of packed rows that only read by index, both ways: on a CPU writing so takes 3 to 5 times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["invert", "take_rows"]


def invert(permutation: Tensor) -> Tensor:
    """The inverse of a permutation, int64 (N,): where each row went."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


class _TakeRows(torch.autograd.Function):
    """A permutation of rows whose gradient is the inverse permutation: reads, where index_select would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        ctx.save_for_backward(rank)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rank,) = ctx.saved_tensors
        return grads[0].index_select(0, rank), None, None


def take_rows(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """x[order] for a permutation of all rows of x; `rank` is its inverse."""
    return _TakeRows.apply(x, order, rank)
