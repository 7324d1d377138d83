"""Argument checks that the operators share. Each raises a ValueError that begins with the argument's name."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_eps", "check_floating", "check_index", "check_like", "check_shape", "looked_at"]


def check_floating(name: str, tensor: Tensor, dimensions: int) -> None:
    """Require a floating tensor with this number of dimensions."""
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {dimensions} dimension(s)")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be a floating type")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Require an exact shape; `meaning` names its dimensions."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {meaning} = {shape}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Require the device of `other`, and its dtype (or the given one)."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other_name}'s device, {other.device}")
    required = other.dtype if dtype is None else dtype
    if tensor.dtype != required:
        where = f", as {other_name} is" if dtype is None else ""
        raise ValueError(f"{name} is {tensor.dtype}; it must be {required}{where}")


def check_eps(eps: float) -> None:
    """Require a positive number."""
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be above 0")


def check_index(
    name: str, index: Tensor, count: int, meaning: str, table_name: str, table: Tensor, rows: int, lowest: int = 0
) -> None:
    """Require int64 (count,) on the device of `table`; on the CPU also values from `lowest` to `rows` − 1."""
    check_shape(name, index, (count,), meaning)
    check_like(name, index, table_name, table, dtype=torch.int64)
    if looked_at(index):
        values = index.numpy()
        low, high = int(values.min()), int(values.max())
        if high >= 0 and not rows:
            raise ValueError(f"{name} is not empty; {table_name} has no rows")
        if low < lowest or high >= rows:
            raise ValueError(f"{name} spans {low} to {high}; {table_name} has rows 0 to {rows - 1}")


def looked_at(index: Tensor) -> bool:
    """Return whether values can be read without a device synchronisation; not while a graph is traced.

    NumPy reads them in place, because torch's operators are counted as synchronisations of a step.
    """
    return index.device.type == "cpu" and index.numel() > 0 and not torch.compiler.is_compiling()
