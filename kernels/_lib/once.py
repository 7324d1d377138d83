"""Refuse a graph of gradients that have none: a second derivative would count them as constants, in silence."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

__all__ = ["once_differentiable", "refuse_graph"]


def once_differentiable(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward pass of an autograd.Function: with ``create_graph=True`` it raises RuntimeError.

    PyTorch's decorator of this name reports only what a second backward pass meets: not where the upstream gradient is
    a constant, as a loss's is, nor where `torch.autograd.grad` leaves out a node that leads to none of its inputs.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            refuse_graph(name)
            return backward(ctx, *grads)

        return checked

    return decorate


def refuse_graph(name: str) -> None:
    """Raise RuntimeError in a backward pass with ``create_graph=True``; ``name``: what has no second derivative."""
    # A compiled graph is traced with gradients on; AOTAutograd reports what differentiates it twice.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} is differentiable once: create_graph=True cannot pass through it")
