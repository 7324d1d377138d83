"""Checks of arguments that the operators share. Each failure is a ValueError that begins with the argument's name."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_eps", "check_floating", "check_like", "check_shape"]


def check_floating(name: str, tensor: Tensor, dimensions: int) -> None:
    """Require a floating tensor of so many dimensions."""
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {dimensions} dimension(s)")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be a floating type")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Require an exact shape; `meaning` is that shape in letters."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {meaning} = {shape}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Require the device of `other`, and its dtype (or the one given)."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other_name}'s device, {other.device}")
    required = other.dtype if dtype is None else dtype
    if tensor.dtype != required:
        where = f", as {other_name} is" if dtype is None else ""
        raise ValueError(f"{name} is {tensor.dtype}; it must be {required}{where}")


def check_eps(eps: float) -> None:
    """Require a number that keeps a square root away from zero."""
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be above 0")
